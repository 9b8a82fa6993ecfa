"""A checkpoint as a Hugging Face folder, and such a folder back as a checkpoint: bit-equal weights, the same token ids.

    config.json, generation_config.json    shape and special ids; auto_map names the classes of the modelling file
    modeling_nanochat_gpt.py               what transformers runs with trust_remote_code=True
    model.safetensors                      the checkpoint's own tensors under their own names, fp32
    tokenizer.json, tokenizer_config.json  the same ids as ours; the chat template
    nanochat.json                          what a checkpoint knows beside them: meta.json's content, for the way back
    README.md                              the model card

The folder is made under a temporary name and renamed when it is whole.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from nanochat import checkpoint, gpt, paths, saving
from nanochat.errors import UserError
from nanochat.export import tokenizer_json
from nanochat.gpt import GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

MODELING = "modeling_nanochat_gpt"
FORMAT = 1


def config_json(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of config.json: NanochatGPTConfig's arguments, and where transformers finds the classes."""
    ends = [tokenizer.special("<|assistant_end|>"), tokenizer.bos]
    return {
        "architectures": ["NanochatGPTForCausalLM"],
        "model_type": "nanochat_gpt",
        "auto_map": {
            "AutoConfig": f"{MODELING}.NanochatGPTConfig",
            "AutoModelForCausalLM": f"{MODELING}.NanochatGPTForCausalLM",
        },
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.padded_vocab,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "intermediate_size": 4 * config.n_embd,
        "max_position_embeddings": config.sequence_len,
        "attention_windows": config.windows(),
        "window_pattern": config.window_pattern,
        "rms_norm_eps": gpt.EPS,
        "rotary_base": gpt.ROPE_BASE,
        "query_key_scale": gpt.QK_SCALE,
        "value_gate_scale": gpt.VE_GATE_SCALE,
        "value_gate_channels": gpt.VE_GATE_CHANNELS,
        "smear_channels": gpt.SMEAR_CHANNELS,
        "logit_softcap": gpt.SOFTCAP,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": ends,
        "pad_token_id": ends[0],  # one of the ends, else transformers takes it in a prompt for padding
        "use_cache": True,
    }


def write(folder: Path | str, source: checkpoint.Checkpoint, tokenizer: Tokenizer, card: str) -> Path:
    """Write the folder, whole or not at all; an earlier export there is replaced, anything else is refused."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "nanochat.json").exists():
        raise UserError(f"{folder} is not empty and no earlier export: name another folder with --output.")
    checkpoint.check_tokenizer(source, tokenizer)
    config = GPTConfig(**source.meta["config"])
    with paths.staged(folder) as part:
        part.mkdir()
        _fill(part, source, tokenizer, config, card)
    return folder


def _fill(part: Path, source, tokenizer: Tokenizer, config: GPTConfig, card: str) -> None:
    content = config_json(config, tokenizer)
    paths.write_json(part / "config.json", content)
    ids = {name: content[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    paths.write_json(part / "generation_config.json", ids | {"do_sample": False})
    paths.write_json(part / "tokenizer.json", tokenizer_json.tokenizer_json(tokenizer))
    paths.write_json(part / "tokenizer_config.json", tokenizer_json.tokenizer_config(tokenizer, config.sequence_len))
    paths.write_json(part / "nanochat.json", {"format": FORMAT, "meta": source.meta, "tokenizer_meta": tokenizer.meta})
    shutil.copyfile(Path(__file__).with_name(f"{MODELING}.py"), part / f"{MODELING}.py")
    # transformers insists on the label "pt"
    saving.write_tensors(part / "model.safetensors", source.weights(), {"stage": source.meta["stage"]}, format="pt")
    with paths.atomic_write(part / "README.md", "w") as file:
        file.write(card)


def model_of(folder: Path) -> tuple[gpt.GPT, Tokenizer]:
    """Our own model and tokenizer from an exported folder."""
    content = _about(folder)
    ranks = tokenizer_json.ranks_of(paths.read_json(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_ranks(ranks, content["tokenizer_meta"])
    if tokenizer.fingerprint != content["meta"]["tokenizer"]:
        raise UserError(f"{folder / 'tokenizer.json'} is not the tokenizer of its model: export the model again.")
    try:
        config = GPTConfig(**content["meta"]["config"])
    except TypeError as error:
        raise UserError(f"{folder / 'nanochat.json'} describes no model of ours ({error}).") from error
    model = gpt.GPT(config)
    checkpoint.restore(model, _weights(folder / "model.safetensors"), folder)
    return model.eval(), tokenizer


def _about(folder: Path) -> dict[str, Any]:
    """What nanochat.json of an exported folder says; it may come from a stranger."""
    content = paths.read_json(folder / "nanochat.json")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise UserError(f"{folder / 'nanochat.json'} has format {found}, this version reads {FORMAT}.")
    meta = content.get("meta")
    kinds = {"config": dict, "tokenizer": str, "stage": str, "step": int}
    if not (isinstance(meta, dict) and all(isinstance(meta.get(name), kind) for name, kind in kinds.items())):
        raise UserError(f"{folder / 'nanochat.json'} is damaged: get the folder again.")
    return content


def read(folder: Path | str, stage: str | None = None, tag: str | None = None) -> Path:
    """Make an exported folder a checkpoint of this artefact folder; returns its path.

    stage (base, sft, rl): by default what was exported; tag: the folder's name. The tokenizer is installed where there
    is none; another one there is a UserError, because every model of an artefact folder shares one.
    """
    folder = Path(folder)
    model, tokenizer = model_of(folder)
    meta = _about(folder)["meta"]
    root = checkpoint.run_folder(stage or meta["stage"], tag or folder.resolve().name)
    if checkpoint.complete_steps(root):
        raise UserError(f"{root} has checkpoints already: give another name with --model-tag.")
    _install(tokenizer)
    kept = {name: value for name, value in meta.items() if name not in ("format", "step", "world")}
    kept |= {"stage": stage or meta["stage"], "imported_from": folder.name}
    return saving.save(root, meta["step"], model=model, meta=kept, runtime=Runtime.single())


def _install(tokenizer: Tokenizer) -> None:
    place = paths.base_dir() / "tokenizer"
    if not (place / "tokenizer.json").exists():
        tokenizer.save(place)
    elif Tokenizer.load(place).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{place} holds another tokenizer: set NANOCHAT_BASE_DIR to an empty folder for this model.")


def _weights(path: Path) -> dict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} can't be read ({error}): get the folder again.") from error


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Upload an exported folder to the hub as USER/NAME; returns its address. Needs HF_TOKEN (write access)."""
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError("--push needs a token that may write: set HF_TOKEN (huggingface.co -> settings -> tokens).")
    if repository.count("/") != 1:
        raise UserError(f"--push={repository} is not the name of a repository: give USER/NAME.")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Exported by nanochat")
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"The hub refused {repository} ({str(error).splitlines()[0]}): check HF_TOKEN and the name."
        ) from error
    return f"https://huggingface.co/{repository}"
