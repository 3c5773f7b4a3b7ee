"""Files for llama.cpp and those who read its format, with weights of one dtype."""

from __future__ import annotations

from pathlib import Path

import torch

from fxopt.bench.source import Source
from fxopt.demo_model import DEMO, demo_weights

_FILE_TYPE = "general.file_type"
#: What GGUF calls a dtype: the type of a tensor, and the number of a file of such tensors.
_TYPES = {torch.float32: ("F32", 0), torch.float16: ("F16", 1), torch.bfloat16: ("BF16", 32)}


def why_no_file(source: Source, dtype: torch.dtype) -> str | None:
    """A sentence if there is no file of this model in this dtype, and none can be written."""
    if _is_demo(source) or _found(source, dtype) is not None:
        return None
    if source.random:
        return "there is no file of random weights"
    name = _TYPES[dtype][0]
    return f"there is no .gguf file with {name} weights in {source.name}; llama.cpp's convert_hf_to_gguf.py writes one"


def file_of(source: Source, dtype: torch.dtype, scratch: Path) -> Path:
    """The model in this dtype; that of the demo, which is packed into 4 bits, is written out into ``scratch``."""
    if _is_demo(source):
        return _unpacked(demo_weights(), scratch / "demo.gguf", dtype)
    found = _found(source, dtype)
    assert found is not None, "why_no_file says so first"
    return found


def _is_demo(source: Source) -> bool:
    return not source.random and source.name == DEMO


def _found(source: Source, dtype: torch.dtype) -> Path | None:
    from gguf import GGUFReader

    name = _TYPES[dtype][0]
    for path in sorted(Path(source.name).glob("*.gguf")) if not source.random else []:
        if all(one.tensor_type.name == name for one in GGUFReader(path).tensors if len(one.shape) > 1):
            return path
    return None


def _unpacked(packed: Path, target: Path, dtype: torch.dtype) -> Path:
    """The same model and tokenizer, with the numbers that Transformers computes with."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, Keys
    from gguf.quants import dequantize, quantize

    reader, (name, number) = GGUFReader(packed), _TYPES[dtype]
    writer = GGUFWriter(target, reader.fields[Keys.General.ARCHITECTURE].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == Keys.General.ARCHITECTURE:
            continue  # which the writer writes
        value = number if field.name == _FILE_TYPE else field.contents()
        writer.add_key_value(field.name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type).astype("float32")
        kind = GGMLQuantizationType[name] if len(tensor.shape) > 1 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
