"""Other programs as contenders: what is asked of them, and why they may stay away."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.bench import gguf_files, llama_cpp, openvino
from fxopt.bench.contender import Contender
from fxopt.bench.gguf_files import file_of, why_no_file
from fxopt.bench.llama_cpp import LlamaCpp
from fxopt.bench.openvino import OpenVino
from fxopt.bench.setting import Setting
from fxopt.bench.source import Source
from fxopt.bench.subject import Subject
from fxopt.demo_model import demo_weights, is_demo_installed

CPU = torch.device("cpu")
PROMPT = torch.tensor([[5, 6, 7]])
gguf: Any = pytest.importorskip("gguf", reason="the extra demo is not installed")
needs_demo = pytest.mark.skipif(not is_demo_installed(), reason="the extra demo is not installed")


def subject(
    name: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU, *, random: bool = False
) -> Subject:
    return Subject(Source(name, random, dtype, device), None, None, max_len=40, max_batch=1)


def written(path: Path, kind: str) -> Path:
    """A GGUF file of one matrix in four bits or in floats, one vector, and what a reader wants to know."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(3)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "b"])
    matrix = torch.arange(64, dtype=torch.float32).reshape(2, 32).numpy()
    tensor_type = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("blk.0.attn_q.weight", gguf.quants.quantize(matrix, tensor_type), raw_dtype=tensor_type)
    writer.add_tensor("blk.0.attn_norm.weight", matrix[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Packages that note what is asked of them, and generate 40, 41, 42 …"""
    noted: dict[str, Any] = {"llama": [], "openvino": []}

    class Llama:
        def __init__(self, path: str, **options: Any) -> None:
            noted["path"], noted["options"] = path, options

        def reset(self) -> None:
            noted["llama"].append("reset")

        def generate(self, tokens: list[int], **options: Any) -> Iterator[int]:
            noted["llama"].append((tokens, options))
            yield from range(40, 400)

    class Pipeline:
        def __init__(self, path: Path, device: str, **options: Any) -> None:
            noted["path"], noted["options"] = path, options

        def generate(self, tokens: Any, config: Any, streamer: Any = None) -> Any:
            noted["openvino"].append((tokens.tolist(), config))
            found = list(range(40, 40 + config["max_new_tokens"]))
            if streamer is not None:
                streamer.write(found[0])
                streamer.write(found[1:])
            return types.SimpleNamespace(tokens=[found])

    def module(name: str, **contents: Any) -> None:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        made.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    module("llama_cpp", Llama=Llama)
    module("openvino", Tensor=lambda array: array)
    status = types.SimpleNamespace(RUNNING=0)
    module("openvino_genai", LLMPipeline=Pipeline, GenerationConfig=dict, StreamerBase=object, StreamingStatus=status)
    return noted


@pytest.mark.parametrize("kind", [LlamaCpp, OpenVino])
def test_who_is_not_installed_says_so(kind: type[Contender], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (llama_cpp, openvino):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name != "gguf" else object())
    reason = kind().why_not(subject("demo"), Setting(1, 3, 4, 40))
    assert reason is not None
    assert reason.endswith('is not installed; pip install "fxopt[peers]"')


@pytest.mark.parametrize("kind", [LlamaCpp, OpenVino])
def test_one_sequence_at_a_time(kind: type[Contender], installed: Any) -> None:
    assert "one sequence at a time" in str(kind().why_not(subject("demo"), Setting(2, 3, 4, 40)))


@pytest.mark.parametrize("kind", [LlamaCpp, OpenVino])
def test_random_weights_have_no_file(kind: type[Contender], installed: Any) -> None:
    assert kind().why_not(subject("tiny", random=True), Setting(1, 3, 4, 40)) == "there is no file of random weights"


def test_llama_cpp(installed: dict[str, Any], tmp_path: Path) -> None:
    """The file of the dtype, keys and values in it too, greedy, and nothing left from the run before."""
    path = written(tmp_path / "model.gguf", "F16")
    one, stamps = LlamaCpp(), []
    assert one.why_not(subject(str(tmp_path), torch.float16), Setting(1, 3, 4, 40)) is None
    assert "no .gguf file with F32 weights" in str(one.why_not(subject(str(tmp_path)), Setting(1, 3, 4, 40)))
    one.prepare(subject(str(tmp_path), torch.float16))
    assert installed["path"] == str(path)
    options = installed["options"]
    assert (options["n_ctx"], options["type_k"], options["type_v"], options["n_gpu_layers"]) == (40, 1, 1, 0)
    assert options["n_threads"] == torch.get_num_threads()
    assert one.generate(PROMPT, 4, lambda: stamps.append(1)) == [[40, 41, 42, 43]]
    assert len(stamps) == 4
    assert installed["llama"] == ["reset", ([5, 6, 7], {"temp": 0.0, "repeat_penalty": 1.0})]
    assert one.generate(PROMPT, 2, None) == [[40, 41]]


def test_openvino(installed: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", "F16")
    one, stamps = OpenVino(), []
    assert one.why_not(subject(str(tmp_path)), Setting(1, 3, 4, 40)) is None
    one.prepare(subject(str(tmp_path)))
    assert installed["path"] == path
    options = installed["options"]
    assert options["INFERENCE_PRECISION_HINT"] == options["KV_CACHE_PRECISION"] == "f32"
    assert options["ATTENTION_BACKEND"] == "SDPA"
    assert one.generate(PROMPT, 4, lambda: stamps.append(1)) == [[40, 41, 42, 43]]
    assert len(stamps) == 4
    assert installed["openvino"] == [
        ([[5, 6, 7]], {"max_new_tokens": 4, "ignore_eos": True, "do_sample": False}),
    ]
    assert one.generate(PROMPT, 2, None) == [[40, 41]]


def test_an_exported_model_comes_first(installed: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path / "model.gguf", "F16")
    (tmp_path / "openvino_model.xml").write_text("")
    OpenVino().prepare(subject(str(tmp_path)))
    assert installed["path"] == tmp_path


def test_openvino_stays_on_the_cpu(installed: Any) -> None:
    there = subject("demo", device=torch.device("cuda"))
    assert OpenVino().why_not(there, Setting(1, 3, 4, 40)) == "it does not run on cuda"
    assert LlamaCpp().why_not(there, Setting(1, 3, 4, 40)) is None


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "name", "number"), [(torch.float32, "F32", 0), (torch.bfloat16, "BF16", 32)])
def test_a_packed_file_is_written_out(tmp_path: Path, dtype: torch.dtype, name: str, number: int) -> None:
    """The same numbers and words; norms stay in float32."""
    packed = written(tmp_path / "packed.gguf", "Q4_1")
    plain = gguf.GGUFReader(gguf_files._unpacked(packed, tmp_path / "plain.gguf", dtype))
    before = gguf.GGUFReader(packed)
    assert plain.fields["general.architecture"].contents() == "llama"
    assert plain.fields["tokenizer.ggml.tokens"].contents() == ["<s>", "a", "b"]
    assert plain.fields["general.file_type"].contents() == number
    assert [one.tensor_type.name for one in plain.tensors] == [name, "F32"]
    for one, other in zip(plain.tensors, before.tensors, strict=True):
        found, wanted = (torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in (one, other))
        torch.testing.assert_close(found.to(dtype), wanted.to(dtype), rtol=0, atol=0)


@needs_demo
def test_the_demo_model_needs_no_file() -> None:
    assert why_no_file(Source("demo", False, torch.bfloat16, CPU), torch.bfloat16) is None
    assert demo_weights().exists()


def test_the_file_of_a_folder(tmp_path: Path) -> None:
    written(tmp_path / "a.gguf", "Q4_1")
    wanted = written(tmp_path / "b.gguf", "BF16")
    source = Source(str(tmp_path), False, torch.bfloat16, CPU)
    assert file_of(source, torch.bfloat16, tmp_path) == wanted
    assert why_no_file(source, torch.bfloat16) is None
    assert "no .gguf file with F16 weights" in str(why_no_file(source, torch.float16))
