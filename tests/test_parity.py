"""Promise: on the same checkpoint this model computes what transformers' Qwen2.5-VL computes, and every token has the
position that it had in the paper's version of the model.

`python tests/parity.py --model DIR` makes the same comparison on real weights.
"""
from dataclasses import replace

import pytest
import torch
from parity import (CASES, ask_ours, ask_transformers, compare, load_reference, make_prompts, random_model,
                    real_tokens)

from model import CONFIGS, load_model, mrope_positions, qwen, save_model, write_config

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
    logits, logprobs = ask_transformers(reference, prompts, model.config, answers.tokens[:, 0])
    differences, greedy = compare(answers, logits, logprobs)
    assert all(x < 1e-4 for x in differences.values()) and greedy, differences
    assert logits.abs().max() > 1                            # flat ones would agree whatever the network does


# ------------------------------------------------------------------------------------------------ the position rule

TEXT, IMAGE, VIDEO = 1, CONFIGS["tiny"].image_token_id, CONFIGS["tiny"].video_token_id


def positions_of(ids: list[int], grid, seconds) -> tuple[list[list[int]], int]:
    positions, following = mrope_positions(torch.tensor(ids), grid, seconds, CONFIGS["tiny"])
    return positions.tolist(), following


def test_text_counts_alike_in_all_axes_and_resumes_after_the_largest_position_of_a_medium():
    assert positions_of([TEXT] * 4, [], []) == ([[0, 1, 2, 3]] * 3, 4)
    # Two rows of three tokens begin at position 1; the largest position used is 1 + 2, so text goes on at 4.
    assert positions_of([TEXT] + [IMAGE] * 6 + [TEXT], [(1, 4, 6)], [0.0]) == (
        [[0, 1, 1, 1, 1, 1, 1, 4],
         [0, 1, 1, 1, 2, 2, 2, 4],
         [0, 1, 2, 3, 1, 2, 3, 4]], 5)
    # The next medium begins there, too, and needs no text before it.
    assert positions_of([IMAGE] * 3, [(1, 2, 2), (1, 2, 4)], [0.0] * 2) == (
        [[0, 1, 1],
         [0, 1, 1],
         [0, 1, 2]], 3)


@pytest.mark.parametrize("seconds, time", [(0.5, [2, 3, 4]), (1.7, [2, 5, 8]), (2.0, [2, 6, 10])])
def test_time_advances_by_seconds_and_text_resumes_after_it(seconds, time):
    # floor(step · seconds · 2 tokens per second), so 1.7 s give floor(0, 3.4, 6.8); three steps of 2×1 tokens
    after = max(time[-1], 3) + 1
    assert positions_of([TEXT, TEXT] + [VIDEO] * 6 + [TEXT, TEXT], [(3, 4, 2)], [seconds]) == (
        [[0, 1, time[0], time[0], time[1], time[1], time[2], time[2], after, after + 1],
         [0, 1, 2, 3, 2, 3, 2, 3, after, after + 1],
         [0, 1, 2, 2, 2, 2, 2, 2, after, after + 1]], after + 2)


def test_transformers_has_the_same_rule_where_its_versions_agree(both):
    """Images, and videos no longer in time than in space. What differs beyond is why parity passes positions on."""
    model, reference = both
    rate, merge = model.config.vision.tokens_per_second, model.config.vision.spatial_merge_size
    steps, rows, columns, seconds = video = (3, 4, 22, 1.7)
    assert int((steps - 1) * seconds * rate) <= columns // merge - 1
    batch = [[3, (1, 6, 4, 0), 2, video, 4], [3, (1, 4, 8, 0), 2, video, 4]]
    prompts = make_prompts(batch, model.config, seed=4)
    kinds = (prompts.ids == model.config.image_token_id) + 2 * (prompts.ids == model.config.video_token_id)
    expected, delta = reference.model.get_rope_index(
        prompts.ids, mm_token_type_ids=kinds, attention_mask=real_tokens(prompts).long(),
        image_grid_thw=torch.tensor(prompts.grid[::2]), video_grid_thw=torch.tensor(prompts.grid[1::2]),
        second_per_grid_ts=torch.tensor([seconds] * 2))
    real = real_tokens(prompts)
    assert torch.equal(prompts.positions[:, real], expected[:, real])
    assert torch.equal(prompts.next_position, prompts.lengths + delta[:, 0])


MISFITS = {
    "too many": ([TEXT, IMAGE, IMAGE], [(1, 2, 2)]),
    "too few before text": ([VIDEO, VIDEO, TEXT, TEXT], [(2, 2, 4)]),
    "text between": ([IMAGE, TEXT, IMAGE], [(1, 2, 4)]),
    "a medium without any": ([IMAGE, IMAGE, TEXT], [(1, 2, 4), (1, 2, 2)]),
}


@pytest.mark.parametrize("which", MISFITS)
def test_placeholders_and_grids_must_agree_exactly(which):
    ids, grid = MISFITS[which]
    with pytest.raises(ValueError, match="placeholders of media in the prompt do not fit the grids"):
        positions_of(ids, grid, [1.0] * len(grid))
