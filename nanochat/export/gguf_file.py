"""A model as a GGUF file: every weight, the shape and the tokenizer in the container that llama.cpp reads.

llama.cpp runs a file only if it has the file's architecture built in, and it has none with these parts: see `MISSING`.
So the file is complete and can be read by any GGUF tool, but stock llama.cpp refuses it; nothing is left out to make
a file that would load and answer differently. What each part would need there stands in the table.
"""

from pathlib import Path

import torch

from nanochat import gpt, paths
from nanochat.errors import UserError
from nanochat.export import tokenizer_json
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import Tokenizer

ARCHITECTURE = "nanochat-gpt"
MISSING = {  # part of the model: what llama.cpp (gguf 0.19's tables of tensors) has instead
    "smear": "no tensor that mixes the previous token's embedding into a token",
    "scaled residual stream": "no scales that mix the embedding into every block's input",
    "value embeddings": "no embedding table added to the values of a layer, nor its gate",
    "backout": "no subtraction of the middle of the stream from its end",
    "ReLU^2 with QK norm": "ReLU^2 without a gate only in architectures without QK norm (arcee, nemotron)",
}


def sentence() -> str:
    """What a user must know about the file, in one sentence."""
    return (
        f"llama.cpp has no architecture with {', '.join(MISSING)}: the GGUF file holds the whole model under the name "
        f"{ARCHITECTURE!r}, but stock llama.cpp refuses to run it; use the Hugging Face folder or the ONNX graph."
    )


def write(
    path: Path | str, weights: dict[str, torch.Tensor], config: GPTConfig, tokenizer: Tokenizer, name: str
) -> Path:
    """Write the file (fp32 tensors under their own names); returns its path. UserError: gguf is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("--format=gguf needs the package gguf: install nanochat[export].") from error

    with paths.staged(path) as part:
        writer = gguf.GGUFWriter(part, ARCHITECTURE)
        writer.add_name(name)
        writer.add_description(sentence())
        _shape(writer, config)
        _vocabulary(writer, tokenizer, gguf.TokenType)
        for key, tensor in weights.items():
            writer.add_tensor(key, tensor.float().numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return Path(path)


def _shape(writer, config: GPTConfig) -> None:
    writer.add_context_length(config.sequence_len)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(gpt.EPS)
    writer.add_rope_freq_base(gpt.ROPE_BASE)
    writer.add_final_logit_softcapping(gpt.SOFTCAP)
    own = {"query_key_scale": gpt.QK_SCALE, "value_gate_scale": gpt.VE_GATE_SCALE}
    for key, value in own.items():
        writer.add_float32(f"{ARCHITECTURE}.{key}", value)
    writer.add_array(f"{ARCHITECTURE}.attention.windows", config.windows())


def _vocabulary(writer, tokenizer: Tokenizer, kinds) -> None:
    """llama.cpp's "gpt2" model: byte letters and merges; the split pattern goes by our architecture's name."""
    content = tokenizer_json.tokenizer_json(tokenizer)["model"]
    tokens = [*content["vocab"], *tokenizer.specials]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(ARCHITECTURE)
    writer.add_token_list(tokens)
    types = [kinds.NORMAL] * len(content["vocab"]) + [kinds.CONTROL] * len(tokenizer.specials)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.special("<|assistant_end|>"))
    writer.add_chat_template(tokenizer_json.CHAT_TEMPLATE)
