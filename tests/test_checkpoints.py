"""Promise: a checkpoint folder is read strictly, written whole or not at all, and exchanged with transformers both ways
without conversion."""
import json
import os
from dataclasses import replace

import pytest
import torch
from parity import load_reference, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import model
from model import CONFIGS, Qwen2_5_VL, load_model, newest_checkpoint, read_config, save_model, write_config

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


def rewrite(file, change) -> None:
    """`change` edits in place what a file of tensors or of JSON holds."""
    content = load_file(file) if file.suffix == ".safetensors" else json.loads(file.read_text())
    change(content)
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        file.write_text(json.dumps(content))


def assert_same(tensors, expected) -> None:
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(tensors[name], x), name


def official_tensors(network) -> dict[str, torch.Tensor]:
    """The parameters of transformers' class, under the names they have on disk."""
    return {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): p
            for name, p in network.named_parameters()}


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
    write(TIED, tmp_path / "a")
    rewrite(tmp_path / "a" / SINGLE, TENSORS[message])
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("changes, message", [
    (dict(tie_word_embeddings=False), r"1 missing tensors .*lm_head\.weight"),
    (dict(num_hidden_layers=5), r"12 missing tensors .*model\.layers\.4\.")])
def test_weights_and_configuration_must_agree(changes, message, tmp_path):
    write(TIED, tmp_path / "a")
    rewrite(tmp_path / "a" / "config.json", lambda raw: raw.update(changes))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "a")


def test_a_folder_without_configuration_or_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_model(tmp_path)
    write_config(TIED, tmp_path, [3])
    with pytest.raises(ValueError, match="missing tensors"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------------ folders from elsewhere

def same_weights(folder, tensors) -> bool:
    loaded = dict(load_model(folder).named_parameters())
    return loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], x) for name, x in tensors.items())


@pytest.mark.parametrize("shard_bytes", [2 ** 20, 2 ** 40], ids=["beside an index", "beside a single file"])
def test_stale_files_and_backups_are_not_read(shard_bytes, tmp_path):
    tensors = write(TIED, tmp_path, shard_bytes=shard_bytes)
    stale = {name: torch.zeros_like(x) for name, x in tensors.items()}
    for name in ("model_before_rl.safetensors", "model-00001-of-00001.safetensors", "modelx.safetensors"):
        save_file(stale, tmp_path / name)
    if shard_bytes == 2 ** 20:                               # the index decides, not a single file from before
        save_file(stale, tmp_path / SINGLE)
    assert same_weights(tmp_path, tensors)


def test_a_file_that_the_index_names_must_be_there(tmp_path):
    write(TIED, tmp_path, shard_bytes=2 ** 20)
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=f"cannot be read: .*{first.name}"):
        load_model(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="cannot be read: .*weight_map"):
        load_model(tmp_path)


@pytest.mark.parametrize("where, changes, message", [
    ("root", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}}, "type 'yarn'"),
    ("root", {"rope_scaling": {"rope_type": "linear", "factor": 2, "mrope_section": [16, 24, 24]}}, "'linear'"),
    ("root", {"hidden_act": "gelu"}, "hidden_act 'gelu'"), ("root", {"use_sliding_window": True}, "sliding_window"),
    ("vision_config", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'")])
def test_a_configuration_of_another_network_is_refused(where, changes, message, tmp_path):
    raw = json.loads(json.dumps(PUBLISHED["3b"]))
    (raw if where == "root" else raw[where]).update(changes)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_names_as_transformers_has_them_in_memory_are_read(tmp_path):
    tensors = write(UNTIED, tmp_path)

    def rename(saved):
        for name in list(saved):
            inner = "language_model." if name.startswith("model.") else ""
            if name != "lm_head.weight":
                saved["model." + inner + name.removeprefix("model.")] = saved.pop(name)
    rewrite(tmp_path / SINGLE, rename)
    assert same_weights(tmp_path, tensors)


def test_a_tied_output_matrix_may_be_there_if_it_is_the_embedding(tmp_path):
    tensors = write(TIED, tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    rewrite(tmp_path / SINGLE, lambda saved: saved.update({"lm_head.weight": embedding.clone()}))
    assert same_weights(tmp_path, tensors)
    rewrite(tmp_path / SINGLE, lambda saved: saved.update({"lm_head.weight": embedding + 1}))
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
        load_model(newest_checkpoint(tmp_path))


# ------------------------------------------------------------------------------------------------ a run's checkpoints

HARMS = {
    "half a state": lambda folder: (folder / "state.json").write_text('{"step": '),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "a garbled header": lambda folder: (folder / SINGLE).write_bytes(b"\xff" * 99),
    "weights cut short": lambda folder: os.truncate(folder / SINGLE, 999_999),
    "moments cut short": lambda folder: os.truncate(folder / "optimizer.safetensors", 99),
}


@pytest.fixture
def run(tmp_path):
    """A run's folder with checkpoints of steps 3 and 6."""
    for step in (3, 6):
        folder = tmp_path / f"step-{step:06d}"
        write(TIED, folder)
        save_file({"a": torch.ones(100)}, folder / "optimizer.safetensors")
        (folder / "state.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("how", HARMS)
def test_a_checkpoint_that_cannot_be_read_is_named_and_the_one_before_taken(how, run, capsys):
    assert newest_checkpoint(run).name == "step-000006"
    HARMS[how](run / "step-000006")
    assert newest_checkpoint(run) == run / "step-000003"
    assert "step-000006 is damaged and not used: " in capsys.readouterr().err
    HARMS[how](run / "step-000003")
    with pytest.raises(FileNotFoundError, match="they are damaged"):
        newest_checkpoint(run)


def test_a_checkpoint_can_be_named_itself_and_a_model_from_elsewhere_has_no_state(run):
    assert newest_checkpoint(run / "step-000003") == run / "step-000003"
    (run / "step-000003/state.json").unlink()
    assert newest_checkpoint(run / "step-000003") == run / "step-000003"


# ------------------------------------------------------------------------------------------------ configuration

def published(hidden, layers, heads, kv_heads, mlp, vocab, tied) -> dict:
    """config.json of the official folders, without what the network does not depend on."""
    return {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "bos_token_id": 151643, "eos_token_id": 151645,
            "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
            "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": hidden,
            "intermediate_size": mlp, "max_position_embeddings": 128000, "model_type": "qwen2_5_vl",
            "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
            "use_sliding_window": False, "vocab_size": vocab,
            "vision_config": {"hidden_size": 1280, "in_chans": 3, "out_hidden_size": hidden, "spatial_patch_size": 14,
                              "tokens_per_second": 2},
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}


PUBLISHED = {"3b": published(2048, 36, 16, 2, 11008, 151936, True),
             "7b": published(3584, 28, 28, 4, 18944, 152064, False)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_table_holds_the_official_configurations(size, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[size]))
    assert read_config(tmp_path) == CONFIGS[size]


@pytest.mark.parametrize("config", [TIED, UNTIED, CONFIGS["3b"], CONFIGS["7b"]], ids=["tiny", "untied", "3b", "7b"])
def test_flat_and_nested_files_say_the_same(config, tmp_path):
    write_config(config, tmp_path, [3])
    Qwen2_5_VLConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "nested")
    assert "text_config" in json.loads((tmp_path / "nested" / "config.json").read_text())
    assert read_config(tmp_path) == read_config(tmp_path / "nested") == config


def test_transformers_reads_every_setting_that_we_write(tmp_path):
    unusual = replace(UNTIED, rope_theta=5e4, rms_norm_eps=1e-5, mrope_section=(2, 6, 8), vision=replace(
        TIED.vision, tokens_per_second=5, window_size=56, fullatt_block_indexes=(0,)))
    write_config(unusual, tmp_path, [3, 4])
    theirs = Qwen2_5_VLConfig.from_pretrained(tmp_path)
    text, vision = theirs.text_config, theirs.vision_config
    assert (text.rope_parameters["rope_theta"], text.rope_parameters["mrope_section"]) == (5e4, [2, 6, 8])
    assert (text.rms_norm_eps, text.eos_token_id, theirs.tie_word_embeddings) == (1e-5, 3, False)
    assert (theirs.image_token_id, theirs.video_token_id) == (6, 7)
    assert (vision.tokens_per_second, vision.window_size, list(vision.fullatt_block_indexes)) == (5, 56, [0])
    assert read_config(tmp_path) == unusual


@pytest.mark.parametrize("root, nested, tied", [({}, {}, False), ({}, {"tie_word_embeddings": True}, True),
                                                ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, True)])
def test_tied_embeddings_are_recognised_at_the_root_and_nested(root, nested, tied, tmp_path):
    raw = {k: v for k, v in PUBLISHED["3b"].items() if k != "tie_word_embeddings"} | root | {"text_config": nested}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path).tie_word_embeddings is tied


@pytest.mark.parametrize("field", ["tokens_per_second", "out_hidden_size", "hidden_size"])
def test_a_vision_setting_that_would_have_to_be_guessed_is_asked_for(field, tmp_path):
    raw = json.loads(json.dumps(PUBLISHED["3b"]))
    del raw["vision_config"][field]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=field):
        read_config(tmp_path)


def test_another_model_is_recognised_as_such(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 768, "vocab_size": 50257}')
    with pytest.raises(ValueError, match="is this a Qwen2.5-VL checkpoint"):
        read_config(tmp_path)


# ------------------------------------------------------------------------------------------------ exchange

@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_shards_hold_what_a_single_file_holds(config, tmp_path):
    tensors = write(config, tmp_path / "a", shard_bytes=2 ** 20)
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(f.stat().st_size < 2 ** 20 + 8192 for f in files), "8 KiB for the header"
    assert set(index["weight_map"].values()) == {f.name for f in files}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert_same(load_model(tmp_path / "a").state_dict(), tensors)
    write(config, tmp_path / "b")
    assert not (tmp_path / "b" / INDEX).exists()
    assert_same(load_model(tmp_path / "b").state_dict(), tensors)


def test_numbers_keep_their_type_on_disk_and_take_the_wanted_one_in_memory(tmp_path):
    tensors = {name: x.bfloat16() for name, x in random_model(TIED, seed=0).state_dict().items()}
    save_model(tensors, tmp_path / "a", write_extra=lambda f: write_config(TIED, f, [3], dtype="bfloat16"))
    with safe_open(tmp_path / "a" / SINGLE, "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    assert_same(load_model(tmp_path / "a", torch.bfloat16).state_dict(), tensors)
    assert_same(load_model(tmp_path / "a").state_dict(), {name: x.float() for name, x in tensors.items()})


@pytest.mark.parametrize("shard_bytes", [2 ** 30, 2 ** 20], ids=["one file", "shards"])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_transformers_reads_our_folder(config, shard_bytes, tmp_path):
    tensors = write(config, tmp_path / "a", shard_bytes=shard_bytes)
    network, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(official_tensors(network), tensors)
    assert (network.lm_head.weight is network.model.language_model.embed_tokens.weight) == config.tie_word_embeddings


@pytest.mark.parametrize("shard_size", ["1GB", "1MB"], ids=["one file", "shards"])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_we_read_the_folder_of_transformers(config, shard_size, tmp_path):
    tensors = write(config, tmp_path / "ours")
    load_reference(tmp_path / "ours").save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    assert (tmp_path / "theirs" / INDEX).exists() == (shard_size == "1MB")
    read = load_model(tmp_path / "theirs")
    assert read.config == config
    assert_same(read.state_dict(), tensors)


# ------------------------------------------------------------------------------------------------ whole or not at all

def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_configuration_and_tokenizer_travel_along_and_nothing_else(tmp_path):
    source, tensors = tmp_path / "source", write(TIED, tmp_path / "source", shard_bytes=2 ** 20)
    travels = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
               "generation_config.json", "preprocessor_config.json"]
    stays = ["state.json", "optimizer.safetensors", "README.md"]
    for name in travels + stays:
        (source / name).write_text(f"{{}} of {name}")
    save_model(tensors, tmp_path / "a", source)
    assert set(contents(tmp_path / "a")) == {*travels, "config.json", SINGLE}
    assert all(contents(tmp_path / "a")[name] == contents(source)[name] for name in [*travels, "config.json"])
    assert_same(load_model(tmp_path / "a").state_dict(), tensors)


def interrupt(folder):
    raise KeyboardInterrupt


def test_an_interrupted_write_leaves_the_old_folder_as_it_was(tmp_path):
    folder = tmp_path / "a"
    tensors = write(TIED, folder)
    before = contents(folder)
    with pytest.raises(KeyboardInterrupt):
        save_model({name: x + 1 for name, x in tensors.items()}, folder, source=folder, write_extra=interrupt)
    assert contents(folder) == before


@pytest.mark.parametrize("size", PUBLISHED)
def test_official_rows_have_the_names_and_shapes_of_transformers(size, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[size]))
    with torch.device("meta"):
        network = Qwen2_5_VLForConditionalGeneration._from_config(Qwen2_5_VLConfig.from_pretrained(tmp_path))
        ours = Qwen2_5_VL(CONFIGS[size])
    expected = {name: p.shape for name, p in official_tensors(network).items()}
    assert {name: p.shape for name, p in ours.named_parameters()} == expected
