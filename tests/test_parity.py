"""Promise: on the same checkpoint this model says what transformers' Qwen2.5-VL says, and places every token where the
paper's version of the model placed it.

`python tests/parity.py --model DIR` makes the same comparison on real weights.
"""
from dataclasses import replace

import pytest
import torch
from parity import (CASES, Medium, ask_ours, ask_transformers, compare, load_reference, make_prompts, random_model,
                    real_tokens)

from model import CONFIGS, block_attention, load_model, make_blocks, mrope_positions, qwen, save_model, write_config

SMALL = {  # what official rows have in common is varied here: a value that one side ignores would pass unnoticed
    "tied": qwen(96, 3, 6, 2, 80, 97, True, sections=(2, 3, 3), ids=(5, 6), vision=dict(
        hidden_size=32, depth=4, num_heads=2, intermediate_size=44, tokens_per_second=3, patch_size=4, window_size=16,
        fullatt_block_indexes=(1, 3))),
    "untied": replace(qwen(128, 2, 4, 1, 160, 120, False, sections=(6, 6, 4), ids=(90, 91), vision=dict(
        hidden_size=64, depth=3, num_heads=4, intermediate_size=90, fullatt_block_indexes=(2,))),
        rope_theta=5e4, rms_norm_eps=1e-5),
    "tiny": CONFIGS["tiny"],
}


@pytest.fixture(scope="module", params=SMALL)
def both(request, tmp_path_factory):
    """One random checkpoint, read by this project and by transformers."""
    config, folder = SMALL[request.param], tmp_path_factory.mktemp("parity") / request.param
    save_model(random_model(config, seed=1).state_dict(), folder, write_extra=lambda f: write_config(config, f, [3]))
    return load_model(folder), load_reference(folder)


# ------------------------------------------------------------------------------------------------ the same network

@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_continuations_are_those_of_transformers(both, case):
    model, reference = both
    prompts = make_prompts(CASES[case], model.config, seed=2)
    answers = ask_ours(model, prompts, length=12)
    difference = compare(answers, *ask_transformers(reference, prompts, model.config, answers.tokens[:, 0]))
    assert difference.logits < 1e-4
    assert difference.decoding < 1e-4, "reading the prompt's cache"
    assert difference.scoring < 1e-4, "the path of training"
    assert difference.greedy
    assert difference.largest_logit > 1, "flat logits would agree whatever the network does"


def test_a_forgotten_bias_or_norm_would_be_noticed(both):
    model, _ = both
    prompts = make_prompts(CASES["several of each"], model.config, seed=2)
    vectors = {name: p for name, p in model.named_parameters() if p.dim() == 1}
    with torch.no_grad():
        logits = model(prompts)
        for name, p in vectors.items():
            kept = p.clone()
            p.fill_(0.0 if name.endswith("bias") else 1.0)
            assert (model(prompts) - logits).abs().max() > 1e-3, name
            p.copy_(kept)


def test_windows_are_cut_at_the_edges_of_the_odd_grids(both):
    model, _ = both
    grids = [x.grid for x in CASES["odd grids"][0] if isinstance(x, Medium)]
    _, order, windows, frames = model.visual.layout(grids, "cpu")
    assert len(set(windows.lengths)) > 1 and len(windows.lengths) > len(frames.lengths) == sum(t for t, _, _ in grids)
    assert order.tolist() != list(range(len(order))), "patches are really gathered by windows"


def test_tokens_of_another_prompt_or_of_padding_change_nothing(both):
    model, _ = both
    batch = CASES["ragged batch"]
    together = make_prompts(batch, model.config, seed=3)
    real, at = real_tokens(together), 0
    with torch.no_grad():
        logits = model(together)
        for row, pieces in enumerate(batch):
            alone = make_prompts([pieces], model.config, seed=0)
            alone.ids = together.ids[row:row + 1][real[row:row + 1]][None]
            if alone.pixels is not None:
                alone.pixels, at = together.pixels[at:at + len(alone.pixels)], at + len(alone.pixels)
            assert (model(alone)[0] - logits[row][real[row]]).abs().max() < 1e-4


@pytest.mark.parametrize("lengths", [[4, 4, 4], [16, 8, 4, 2, 16]], ids=["equal blocks", "ragged blocks"])
def test_block_attention_is_plain_attention_inside_each_block(lengths):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, 8, generator=generator) for _ in range(3))                     # (S, H, E)
    expected = [torch.einsum("hqk,khe->qhe", (torch.einsum("qhe,khe->hqk", a, b) * 8 ** -0.5).softmax(-1), c)
                for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths))]
    result = block_attention(q, k, v, make_blocks(lengths, "cpu"))
    assert torch.allclose(result, torch.cat(expected), atol=1e-6)


# ------------------------------------------------------------------------------------------------ the position rule

TEXT, IMAGE, VIDEO = 1, CONFIGS["tiny"].image_token_id, CONFIGS["tiny"].video_token_id


def positions_of(ids: list[int], grid, seconds) -> tuple[list[list[int]], int]:
    positions, following = mrope_positions(torch.tensor(ids), grid, seconds, CONFIGS["tiny"])
    return positions.tolist(), following


def test_text_alone_counts_on_alike_in_all_axes():
    assert positions_of([TEXT] * 4, [], []) == ([[0, 1, 2, 3]] * 3, 4)


def test_text_after_an_image_resumes_past_its_longer_side():
    # two rows of three tokens stand from position 1 on; the largest position used is 1 + 2, so text goes on at 4
    positions, following = positions_of([TEXT] + [IMAGE] * 6 + [TEXT], [(1, 4, 6)], [0.0])
    assert positions == [[0, 1, 1, 1, 1, 1, 1, 4],
                         [0, 1, 1, 1, 2, 2, 2, 4],
                         [0, 1, 2, 3, 1, 2, 3, 4]]
    assert following == 5


@pytest.mark.parametrize("seconds, time", [(0.5, [2, 3, 4]), (1.0, [2, 4, 6]), (1.7, [2, 5, 8]), (2.0, [2, 6, 10])])
def test_time_runs_with_the_clock_and_text_resumes_after_it(seconds, time):
    # floor(step · seconds · 2 tokens per second), so 1.7 s give floor(0, 3.4, 6.8); three steps of 2×1 tokens
    positions, following = positions_of([TEXT, TEXT] + [VIDEO] * 6 + [TEXT, TEXT], [(3, 4, 2)], [seconds])
    after = max(time[-1], 3) + 1
    assert positions == [[0, 1] + [t for t in time for _ in range(2)] + [after, after + 1],
                         [0, 1] + [2, 3] * 3 + [after, after + 1],
                         [0, 1] + [2] * 6 + [after, after + 1]]
    assert following == after + 2


def test_media_side_by_side_start_where_the_last_one_ended():
    positions, following = positions_of([VIDEO] * 2 + [IMAGE] * 2, [(2, 2, 2), (1, 2, 4)], [1.0, 0.0])
    assert positions == [[0, 2, 3, 3], [0, 0, 3, 3], [0, 0, 3, 4]]
    assert following == 5


def test_transformers_has_the_same_rule_where_its_versions_agree(both):
    """Images, and videos no longer in time than in space. What differs beyond is why parity passes positions on."""
    model, reference = both
    rate, merge = model.config.vision.tokens_per_second, model.config.vision.spatial_merge_size
    grid, seconds = (3, 4, 22), 1.7
    assert int(2 * seconds * rate) <= 22 // merge - 1
    prompts = make_prompts([[3, image, 2, Medium("video", grid, seconds), 4] for image in (
        Medium("image", (1, 6, 4)), Medium("image", (1, 4, 8)))], model.config, seed=4)
    kinds = (prompts.ids == model.config.image_token_id) + 2 * (prompts.ids == model.config.video_token_id)
    expected, delta = reference.model.get_rope_index(
        prompts.ids, mm_token_type_ids=kinds, attention_mask=real_tokens(prompts).long(),
        image_grid_thw=torch.tensor(prompts.grid[::2]), video_grid_thw=torch.tensor(prompts.grid[1::2]),
        second_per_grid_ts=torch.tensor([seconds] * 2))
    real = real_tokens(prompts)
    assert torch.equal(prompts.positions[:, real], expected[:, real])
    assert torch.equal(prompts.next_position, prompts.lengths + delta[:, 0])


@pytest.mark.parametrize("ids, grid, message", [
    ([TEXT, TEXT], [(1, 2, 2)], "placeholders for fewer"),
    ([TEXT, IMAGE, TEXT], [(1, 2, 2), (1, 2, 2)], "placeholders for fewer"),
    ([TEXT, IMAGE, IMAGE], [(1, 2, 2)], "1 media placeholders are left over"),
    ([IMAGE, TEXT, IMAGE], [(1, 2, 4)], "2 tokens does not fit its placeholders at token 0"),
    ([TEXT, VIDEO, VIDEO], [(2, 2, 4)], "4 tokens does not fit its placeholders at token 1"),
], ids=["no placeholder", "one medium too many", "one placeholder too many", "torn apart by text", "past the end"])
def test_placeholders_that_do_not_match_their_media_are_refused(ids, grid, message):
    with pytest.raises(ValueError, match=message):
        positions_of(ids, grid, [1.0] * len(grid))
