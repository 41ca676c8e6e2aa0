"""A llama.cpp model file made on the spot: a Llama with random weights, under 1 MB, in well under a second.

What it is for: tests that need a *real* engine with a *real* prefix cache, and no download. The weights are
noise, so the text is noise as well; tokens are counted, cached and streamed as with any model.

    vocabulary   0..255   the bytes, spelled as GPT-2's byte-level BPE spells them
                 256..    what MERGES joins (llama.cpp insists on a list of merges)
                 last 3   <|endoftext|>  <|im_start|>  <|im_end|>   (control tokens of the ChatML template)

Names of tensors and keys: the GGUF specification and llama.cpp's `llama` architecture. The output rows of all
but letters, digits and spaces are zero: greedy text is then printable, and never ends before `max_tokens`.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

LAYERS, HIDDEN, HEADS, FEED_FORWARD, CONTEXT = 2, 128, 2, 256, 8192
MERGES = ("Ġ t", "h e", "Ġt he", "i n", "r e", "o n", "e r", "Ġ a", "Ġ s", "a t", "n d", "Ġ w", "o r")
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_tokens() -> list[str]:
    """GPT-2's spelling of the 256 bytes: printable ones stand for themselves, others move up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(moved)) for b in range(256)]


def _write_header(writer: gguf.GGUFWriter, tokens: list[str]) -> None:
    writer.add_name("tiny-llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    normal = [gguf.TokenType.NORMAL] * (len(tokens) - len(CONTROL))
    writer.add_token_types([*normal, *[gguf.TokenType.CONTROL] * len(CONTROL)])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write_weights(writer: gguf.GGUFWriter, tokens: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)

    def noise(name: str, rows: int, columns: int, spread: float = 0.05) -> None:
        writer.add_tensor(name, (rng.standard_normal((rows, columns)) * spread).astype(np.float16))

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(HIDDEN, dtype=np.float32))

    noise("token_embd.weight", len(tokens), HIDDEN, 1.0)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        ones(prefix + "attn_norm.weight")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            noise(f"{prefix}{part}.weight", HIDDEN, HIDDEN)
        ones(prefix + "ffn_norm.weight")
        noise(prefix + "ffn_gate.weight", FEED_FORWARD, HIDDEN)
        noise(prefix + "ffn_up.weight", FEED_FORWARD, HIDDEN)
        noise(prefix + "ffn_down.weight", HIDDEN, FEED_FORWARD)
    ones("output_norm.weight")
    sayable = np.array([[(token.isascii() and token.isalnum()) or token == "Ġ"] for token in tokens])
    output = rng.standard_normal((len(tokens), HIDDEN)) * sayable
    writer.add_tensor("output.weight", output.astype(np.float16))


def make(path: Path, *, seed: int = 20) -> Path:
    """Write the model to `path` and return it. The same seed gives the same weights and greedy text."""
    tokens = [*_byte_tokens(), *("".join(merge.split()) for merge in MERGES), *CONTROL]
    writer = gguf.GGUFWriter(path, "llama")
    _write_header(writer, tokens)
    _write_weights(writer, tokens, seed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
