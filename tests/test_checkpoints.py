"""Promise: a checkpoint folder is read strictly, written whole or not at all, and exchanged with transformers both ways
without conversion."""
import json
from dataclasses import replace

import pytest
import torch
from parity import random_model
from safetensors.torch import load_file, save_file
from toy_runs import equal
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import model
from model import CONFIGS, load_model, newest_checkpoint, read_config, save_model, write_config

TIED = CONFIGS["tiny"]
UNTIED = replace(TIED, tie_word_embeddings=False)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write(config, folder, shard_bytes=2 ** 30) -> dict[str, torch.Tensor]:
    """Writes a random model and returns what should be in the folder."""
    tensors = random_model(config, seed=0).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "SHARD_BYTES", shard_bytes)
        save_model(tensors, folder, write_extra=lambda f: write_config(config, f, [3]))
    return tensors


def rewrite(folder, change) -> None:
    """`change` edits in place what the folder's only file of tensors holds."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def holds(folder, tensors) -> bool:
    return equal(load_model(folder).state_dict(), tensors)


# ------------------------------------------------------------------------------------------------ strict reading

NORM, LORA = "model.norm.weight", "visual.blocks.0.lora.weight"
TENSORS = {
    r"1 missing tensors .*model\.norm\.weight', \(128,\).*0 unexpected": lambda tensors: tensors.pop(NORM),
    r"0 missing .*1 unexpected .*visual\.blocks\.0\.lora": lambda tensors: tensors.update({LORA: torch.ones(2)}),
    r"norm\.weight', \(128,\).*norm\.weight', \(64,\)": lambda tensors: tensors.update({NORM: torch.ones(64)}),
    r"norm\.weight contains NaN": lambda tensors: tensors.update({NORM: torch.full((128,), float("nan"))}),
}


@pytest.mark.parametrize("message", TENSORS)
def test_a_tensor_that_does_not_fit_is_named(message, tmp_path):
    write(TIED, tmp_path)
    rewrite(tmp_path, TENSORS[message])
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_folder_without_configuration_or_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_model(tmp_path)
    write_config(TIED, tmp_path, [3])
    with pytest.raises(ValueError, match="missing tensors"):
        load_model(tmp_path)


# ---------------------------------------------------------------------------------------- folders from elsewhere

@pytest.mark.parametrize("shard_bytes, others", [
    (2 ** 20, ["model_before_rl.safetensors", SINGLE]),      # the index decides
    (2 ** 30, ["model_before_rl.safetensors", "model-00001-of-00001.safetensors"])], ids=["index", "single file"])
def test_stale_files_and_backups_are_not_read(shard_bytes, others, tmp_path):
    tensors = write(TIED, tmp_path, shard_bytes)
    for name in others:
        save_file({NORM: torch.zeros(128)}, tmp_path / name)
    assert holds(tmp_path, tensors)


def test_a_file_that_the_index_names_must_be_there(tmp_path):
    write(TIED, tmp_path, shard_bytes=2 ** 20)
    first = min(tmp_path.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(ValueError, match=f"cannot be read: .*{first.name}"):
        load_model(tmp_path)


def test_names_as_transformers_has_them_in_memory_are_read(tmp_path):
    tensors = write(UNTIED, tmp_path)

    def rename(saved):
        for name in tensors.keys() - {"lm_head.weight"}:
            inner = "language_model." if name.startswith("model.") else ""
            saved["model." + inner + name.removeprefix("model.")] = saved.pop(name)
    rewrite(tmp_path, rename)
    assert holds(tmp_path, tensors)


def test_a_tied_output_matrix_may_be_there_if_it_is_the_embedding(tmp_path):
    tensors = write(TIED, tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    rewrite(tmp_path, lambda saved: saved.update({"lm_head.weight": embedding.clone()}))
    assert holds(tmp_path, tensors)
    rewrite(tmp_path, lambda saved: saved.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        load_model(tmp_path)


@pytest.mark.parametrize("file, message", [("pytorch_model.bin", "save them as safetensors"),
                                           ("adapter_config.json", "LoRA adapter: merge it")])
def test_other_kinds_of_folders_are_named_with_what_helps(file, message, tmp_path):
    (tmp_path / file).write_text("{}")
    with pytest.raises(FileNotFoundError, match=message):
        newest_checkpoint(tmp_path)
    write_config(TIED, tmp_path, [3])
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------------ configuration

# config.json of the official folders, without what the network does not depend on.
VISION = {"hidden_size": 1280, "out_hidden_size": 2048, "spatial_patch_size": 14, "tokens_per_second": 2}
SMALLER = {
    "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
    "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "model_type": "qwen2_5_vl",
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False, "vision_config": VISION,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
LARGER = SMALLER | {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    "vision_config": VISION | {"out_hidden_size": 3584}}


def read_back(raw, folder):
    (folder / "config.json").write_text(json.dumps(raw))
    return read_config(folder)


@pytest.mark.parametrize("size, published", [("3b", SMALLER), ("7b", LARGER)])
def test_the_table_holds_the_official_configurations(size, published, tmp_path):
    assert read_back(published, tmp_path) == CONFIGS[size]


@pytest.mark.parametrize("config", [TIED, UNTIED, CONFIGS["3b"], CONFIGS["7b"]], ids=["tiny", "untied", "3b", "7b"])
def test_flat_and_nested_files_say_the_same(config, tmp_path):
    write_config(config, tmp_path, [3])
    theirs = Qwen2_5_VLConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "nested")
    assert theirs.text_config.eos_token_id == 3
    assert read_config(tmp_path) == read_config(tmp_path / "nested") == config


@pytest.mark.parametrize("root, nested, tied", [(None, None, False), (None, True, True), (True, False, True)])
def test_tied_embeddings_are_recognised_at_the_root_and_nested(root, nested, tied, tmp_path):
    raw = SMALLER | {"tie_word_embeddings": root, "text_config": {"tie_word_embeddings": nested}}
    assert read_back(raw, tmp_path).tie_word_embeddings is tied


@pytest.mark.parametrize("changes, message", [
    ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, "type 'yarn'"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"), ({"use_sliding_window": True}, "sliding_window"),
    ({"vision_config": VISION | {"hidden_act": "quick_gelu"}}, "hidden_act 'quick_gelu'")])
def test_a_configuration_of_another_network_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_back(SMALLER | changes, tmp_path)


@pytest.mark.parametrize("field", ["tokens_per_second", "out_hidden_size", "hidden_size"])
def test_a_vision_setting_that_would_have_to_be_guessed_is_asked_for(field, tmp_path):
    with pytest.raises(ValueError, match=f"{field}.*is this a Qwen2.5-VL checkpoint"):
        read_back(SMALLER | {"vision_config": VISION | {field: None}}, tmp_path)


# ------------------------------------------------------------------------------------------------ exchange

def test_a_large_model_is_written_in_shards(tmp_path):
    tensors = write(UNTIED, tmp_path, shard_bytes=2 ** 20)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 2 ** 20 + 8192, "8 KiB for the header"
    assert holds(tmp_path, tensors)


def test_numbers_keep_their_type_on_disk_and_take_the_wanted_one_in_memory(tmp_path):
    tensors = {name: x.bfloat16() for name, x in random_model(TIED, seed=0).state_dict().items()}
    save_model(tensors, tmp_path / "a", write_extra=lambda f: write_config(TIED, f, [3]))
    assert equal(load_file(tmp_path / "a" / SINGLE), tensors)
    assert equal(load_model(tmp_path / "a", torch.bfloat16).state_dict(), tensors)
    assert holds(tmp_path / "a", {name: x.float() for name, x in tensors.items()})


@pytest.mark.parametrize("shard_bytes", [2 ** 30, 2 ** 20], ids=["one file", "shards"])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_transformers_reads_our_folder_and_we_read_its(config, shard_bytes, tmp_path):
    tensors = write(config, tmp_path / "ours", shard_bytes)
    network, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    network.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    assert (tmp_path / "theirs" / INDEX).exists() == (shard_bytes == 2 ** 20)
    assert read_config(tmp_path / "theirs") == config
    assert holds(tmp_path / "theirs", tensors)


# ------------------------------------------------------------------------------------------------ whole or not at all

def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_configuration_and_tokenizer_travel_along_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    tensors = write(TIED, source, shard_bytes=2 ** 20)
    travels = ["tokenizer.json", "merges.txt", "chat_template.jinja", "generation_config.json"]
    for name in [*travels, "state.json", "optimizer.safetensors", "README.md"]:
        (source / name).write_text(f"{{}} of {name}")
    save_model(tensors, tmp_path / "a", source)
    written = contents(tmp_path / "a")
    assert written.pop(SINGLE)
    assert written == {name: contents(source)[name] for name in [*travels, "config.json"]}


def test_an_interrupted_write_leaves_the_old_folder_as_it_was(tmp_path):
    tensors = write(TIED, tmp_path / "a")
    before = contents(tmp_path / "a")
    with pytest.raises(ZeroDivisionError):
        save_model({name: x + 1 for name, x in tensors.items()}, tmp_path / "a", write_extra=lambda _: 1 / 0)
    assert contents(tmp_path / "a") == before
