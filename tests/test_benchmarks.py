"""Promise: a benchmark is read as it is downloaded. Each is built here in miniature, with the file names, fields and
folders of the official download, clips of the toy world, and one fault that such a download really has."""
import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import data
import eval as evaluation
from eval import BENCHES, grade, read_bench


@pytest.fixture
def clip(toy):
    """clip("a/b.mp4") puts a clip there, clip("a/b.mp4", broken=True) something that is none."""
    source = sorted((toy / "heldout").glob("*.avi"))

    def put(path: Path, broken: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0" * 2000) if broken else shutil.copy(source[len(path.name) % len(source)], path)
    return put


def write_json(file: Path, tree) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tree))


def write_parquet(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def vsibench(root: Path, clip) -> None:
    rows = [("arkitscenes", "41069025", "object_counting", "How many table(s) are in this room?", "4", None),
            ("scannet", "scene0011_00", "object_rel_direction_easy", "Is the sofa left or right?", "B",
             ["A. left", "B. right"]),
            ("scannetpp", "09c1414f1b", "obj_appearance_order", "Which appears first?", "A", ["A. tv", "B. bed"]),
            ("scannet", "scene0999_00", "room_size_estimation", "What is the size of this room?", "23.5", None)]
    (root / "test.jsonl").write_text("".join(json.dumps(dict(
        id=i, dataset=d, scene_name=s, question_type=t, question=q, ground_truth=g, options=o, pruned=False)) + "\n"
        for i, (d, s, t, q, g, o) in enumerate(rows)))
    for d, s, *_ in rows[:3]:                                # fault: one scene was not unpacked
        clip(root / d / f"{s}.mp4")


def videommmu(root: Path, clip) -> None:
    ten = [f"{n} carbon atoms" for n in range(10)]
    row = dict(id="dev_Biology_3", question="<image 1> How many?", options=ten, answer="G",
               question_type="multiple-choice")
    other = row | dict(id="validation_Basic_Medical_Science_2", options=["3, 4", "4, 3"], answer="A",
                       question_type=None)
    hard = dict(id="validation_Math_15", question="<image 1> What is x?", options=[],
                answer="['24/7', '3.429', '3.43']", question_type="open")
    write_parquet(root / "Perception" / "test-00000-of-00001.parquet", [row, other])
    write_parquet(root / "Comprehension" / "test-00000-of-00001.parquet", [row])
    write_parquet(root / "Adaptation" / "test-00000-of-00001.parquet", [other, hard | {"options": None}])
    clip(root / "Science" / "dev_Biology_3.mp4")
    clip(root / "Medicine" / "validation_Basic_Medical_Science_2.mp4", broken=True)   # fault: cannot be decoded
    clip(root / "Science" / "validation_Math_15.mp4")
    clip(root / "__MACOSX" / "Science" / "._dev_Biology_3.mp4", broken=True)
    clip(root / "question_only" / "dev_Biology_3_image.mp4")


def mmvu(root: Path, clip) -> None:
    url = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/{}"
    row = dict(id="validation_1", video=url.format("Computer_Science/0.mp4"), youtube_url="https://youtu.be/x",
               question_type="multiple-choice", metadata={"subject": "Computer Science"}, question="Which law?",
               choices={letter: f"{n} liters" for n, letter in enumerate("ABCDE")}, answer="C")
    write_json(root / "validation.json", [
        row, row | dict(id="validation_2", question_type="open-ended", choices=dict.fromkeys("ABCDE", ""), answer="5"),
        row | dict(id="validation_3", video=url.format("Art/17.mp4"), metadata={"subject": "Art"})])
    clip(root / "videos" / "Computer_Science" / "0.mp4")      # fault: Art/17.mp4 did not come


def vcr_rows() -> list[dict]:
    row = {"id": 3, "video_path": "video/videoEspresso/Law.Abiding.Citizen.2009__#01-14-42_label_G-0-0.mp4",
           "duration": 56, "dimension": "Video Plot Analysis",
           "question": "Why did the man leave?A. He was late\nB. He was hungry\n",
           "multiple-choice": True, "choices": {"A": "He was late", "B": "He was hungry"}, "answer": "B",
           "reasoning": []}
    return [row, row | {"id": 4, "multiple-choice": False, "choices": {}, "answer": "[3, 7]"},
            row | {"id": 5, "question": "Why did she stay?", "duration": 301, "video_path": "video/mmvu/#2.mp4"}]


def vcrbench(root: Path, clip) -> None:
    write_json(root / "v1/videos/meta_info_video.json", vcr_rows())           # fault: # in the names, and one question
    for row in vcr_rows():                                                    # does not hold its options
        clip(root / "v1/videos" / row["video_path"])


MV = {"action_sequence": ("K9UXS.mp4", "star/Charades_v1_480", "star/Charades_segment"),
      "episodic_reasoning": ("castle/s07e03", "tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment"),
      "fine_grained_pose": ("S008.avi", "nturgbd", "nturgbd_convert"),
      "moving_count": ("video_14727.mp4", "clevrer/video_validation", "clevrer/video_validation")}


def mvbench_rows(root: Path, main: bool) -> None:
    for task, (video, *_) in MV.items():
        bound = dict(start=1.0, end=2.0, accurate_start=22, accurate_end=31) if main and task[0] in "ae" else {}
        write_json(root / "json" / f"{task}.json", [
            dict(video=video if main else str(Path(video).with_suffix(".mp4")), question="Which object was tidied up?",
                 candidates=["The table.", "The clothes.", "The towel."], answer="The clothes.", **bound)] * 2)


def mvbench(root: Path, clip) -> None:
    """The layout of branch `main`: raw videos under video/, bounds, frame folders."""
    mvbench_rows(root, main=True)
    clip(root / "video/star/Charades_v1_480/K9UXS.mp4")
    frames = root / "video/tvqa/frames_fps3_hq/castle/s07e03"
    frames.mkdir(parents=True)
    for i in range(1, 13):                                   # 4 s
        data.Image.new("RGB", (28, 28), (20 * i, 0, 0)).save(frames / f"{i:05d}.jpg", quality=95)
    clip(root / "video/data0613/clevrer/video_validation/video_14727.mp4")    # a video of the supplement
    # fault: fine_grained_pose has no videos in this branch


def tempcompass(root: Path, clip) -> None:
    write_parquet(root / "multi-choice/test-00000-of-00001.parquet", [dict(
        video_id="1034419625_reverse", dim="action", answer="A. dunking a basketball",
        question="What is the man doing in the video?\nA. dunking a basketball\nB. passing a basketball")])
    write_parquet(root / "yes_no/test-00000-of-00001.parquet", [
        dict(video_id="1034419625_reverse", dim="speed", question=question, answer=answer)
        for question, answer in (("Is it fast?", "yes"), ("Is it slow?", "no"))])
    write_parquet(root / "caption_matching/test-00000-of-00001.parquet", [dict(
        video_id="77", dim="order", answer="Option 2: A man is falling.",
        question="Which description fits?\nOption 1: A man is jumping.\nOption 2: A man is falling."), dict(
        video_id="1034419625_reverse", dim="order", answer="Caption B: It shrinks.",
        question="Which caption fits?\nCaption A: It grows.\nCaption B: It shrinks.")])
    clip(root / "videos" / "1034419625_reverse.mp4")          # fault: 77.mp4 did not come


def videomme(root: Path, clip) -> None:
    row = dict(video_id="001", duration="short", domain="Knowledge", sub_category="History", url="https://youtu.be/x",
               videoID="-fFjv93ACGo", question_id="001-1", task_type="Counting Problem", answer="C",
               question="What is on the tree?",
               options=["A. Apples.", "B. Candles.", "C. Berries.", "D. The three kinds are of the same number."])
    write_parquet(root / "videomme/test-00000-of-00001.parquet", [
        row, row | dict(question_id="001-2", task_type="OCR Problems", answer="D"),
        row | dict(question_id="700-1", videoID="jRS9fVh7MUw", duration="long")])
    clip(root / "data" / "-fFjv93ACGo.MP4")
    clip(root / "data" / "jRS9fVh7MUw.mp4", broken=True)      # fault: a mirror's file without a frame


#           builder, questions read, media missing or broken, what its table must say
EXPECTED = {"vsibench": (vsibench, 4, 1, ["INCOMPLETE: 1 of 4 (25.0%)", "no such file", "30.1", "36.8",
                                          "mean of multiple choice and MRA (paper)", "mean of eight tasks (official)"]),
            "videommmu": (videommmu, 5, 2, ["cannot be decoded", "Perception", "Adaptation", "Medicine"]),
            "mmvu": (mmvu, 2, 1, ["Computer Science", "20.0"]),
            "vcrbench": (vcrbench, 2, 0, ["Video Plot Analysis", "over 300 s", "50.0"]),
            "mvbench": (mvbench, 8, 2, ["33.3"]),
            "tempcompass": (tempcompass, 5, 1, ["closed formats, pooled", "yes_no", "mean of formats", "50.0"]),
            "videomme": (videomme, 3, 1, ["short", "without subtitles", "25.0"])}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_miniature_is_read_answered_and_counted(name, clip, base, tmp_path, capsys):
    build, questions, lost, said = EXPECTED[name]
    (tmp_path / name).mkdir()
    build(tmp_path / name, clip)
    command = ["--bench", name, "--data", str(tmp_path / name), "--model", str(base), "--preset", "tiny", "--out",
               str(tmp_path / "out"), "--max-pixels", "784", "--max-response", "6"]
    evaluation.main(command)
    out = capsys.readouterr().out
    for words in (*said, f"{questions} questions in", f"NOT the benchmark's {BENCHES[name].expected} questions",
                  f"{questions - lost} questions scored", f"not asked: {lost}.", "at most 32, of 784 pixels"):
        assert words in out
    rows = [json.loads(line) for line in (tmp_path / "out" / name / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == questions == len({r["id"] for r in rows}) and sum("missing" in r for r in rows) == lost
    for r in rows:
        if "missing" not in r:
            assert (r["frames"], r["pixels"]) == ((8 if "tvqa" in r["clip"] else 6), [28, 28])
            assert r["prompt"] and 0 <= r["score"] < 1 and not r["finished"]
    summary = json.loads((tmp_path / "out" / name / "summary.json").read_text())
    assert summary["questions"] == questions and summary["scored"] == questions - lost == summary["cut_off"]
    evaluation.main(command)                                 # again: nothing is asked twice, the table is the same
    assert capsys.readouterr().out == out


def test_prompt_and_template_can_be_chosen_for_a_model_from_elsewhere(clip, base, tmp_path, capsys, monkeypatch):
    mmvu(tmp_path, clip)
    shown, real = [], evaluation.pagrpo.rollout

    def watched(model, examples, vocabulary, *rest):
        shown.extend(vocabulary.decode(e.ids.tolist()) for e in examples)
        return real(model, examples, vocabulary, *rest)
    monkeypatch.setattr(evaluation.pagrpo, "rollout", watched)
    command = ["--bench", "mmvu", "--data", str(tmp_path), "--model", str(base), "--preset", "tiny",
               "--max-pixels", "784", "--max-response", "2", "--out", str(tmp_path / "out")]
    evaluation.main([*command, "--prompt", "full", "--template", "think"])
    assert "<think>" in shown[0] and "<observation>" not in shown[0]
    assert "template think, full prompt" in capsys.readouterr().out


def read(name, build, clip, tmp_path):
    root = tmp_path / name
    root.mkdir()
    build(root, clip)
    items, notes = read_bench(name, root)
    return {i.record.problem_id: i for i in items}, notes, root


def prompt(question) -> str:
    """What the model reads."""
    return data.instruction(question.record, data.InputSettings(prompt="short"))


def test_options_are_shown_once_with_their_letters(clip, tmp_path):
    items, _, _ = read("vcrbench", vcrbench, clip, tmp_path)
    shown = "Why did the man leave?\nOptions:\nA. He was late\nB. He was hungry\n"
    assert prompt(items["3"]) == shown + "Answer with the letter of the correct option."
    assert prompt(items["5"]).count("He was late") == 1
    items, _, _ = read("videomme", videomme, clip, tmp_path)
    assert "B. Candles.\nC. Berries." in prompt(items["001-1"]) and "B. B." not in prompt(items["001-1"])
    items, _, _ = read("mmvu", mmvu, clip, tmp_path)
    assert "Which law?\nOptions:\nA. 0 liters\nB. 1 liters" in prompt(items["validation_1"])
    items, _, _ = read("videommmu", videommmu, clip, tmp_path)
    assert "A. 3, 4\nB. 4, 3\n" in prompt(items["Perception/validation_Basic_Medical_Science_2"])
    row = dict(id="dev_Math_1", question="?", options=["A. (1)", "B. (2)"], answer="B")
    lettered = evaluation.videommmu(row, "Perception", 0, lambda *paths: paths[0])
    assert "Options:\nA. (1)\nB. (2)\nAnswer" in prompt(lettered) and lettered.record.reference == "B"


def test_yes_and_no_and_captions_become_choices_between_texts(clip, tmp_path):
    items, _, _ = read("tempcompass", tempcompass, clip, tmp_path)
    shown = {key.rsplit("/", 1)[0]: prompt(item) for key, item in items.items()}
    assert shown["multi-choice/1034419625_reverse/action"].count("dunking") == 1
    assert "Is it slow?\nOptions:\nA. yes\nB. no" in shown["yes_no/1034419625_reverse/speed"]
    matching = shown["caption_matching/77/order"]
    assert "A. A man is jumping.\nB. A man is falling." in matching and "Option 1" not in matching
    assert [i.record.reference for i in items.values()] == ["A", "A", "B", "B", "B"]


def test_questions_keep_the_sentences_that_belong_to_them(clip, tmp_path):
    items, _, _ = read("videommmu", videommmu, clip, tmp_path)
    assert "Please ignore the Quiz question in last frame" in prompt(items["Perception/dev_Biology_3"])
    adaptation = items["Adaptation/validation_Math_15"]
    assert "following open-ended question. The image for this question is at the end" in prompt(adaptation)
    assert adaptation.record.problem_type == "free-form"
    assert grade(adaptation, "<answer>x is 3.43</answer>")[1] == 1
    assert items["Adaptation/validation_Basic_Medical_Science_2"].groups["discipline"] == "Medicine"
    items, _, _ = read("vsibench", vsibench, clip, tmp_path)
    assert grade(items["0"], "<answer>5</answer>") == ("5", 0.6)
    assert grade(items["1"], "It is on the right.") == ("B", 1.0)


def test_a_folder_of_frames_has_its_rate(clip, tmp_path, tiny_settings):
    """12 pictures at 3 a second are 4 s; the whole of it is read, not the part between its bounds."""
    items, _, root = read("mvbench", mvbench, clip, tmp_path)
    shown, step, _ = data.read_media(items["episodic_reasoning/0"].record, root, data.replace(tiny_settings, fps=0.0))
    assert len(shown) == 6 and round(shown[0][14, 14, 0] / 20) == 1 and round(shown[-1][14, 14, 0] / 20) == 12
    assert step == pytest.approx(4 / 3)


def test_the_other_branch_of_mvbench_holds_clips_that_are_cut_already(clip, tmp_path):
    mvbench_rows(tmp_path, main=False)
    for task, (video, _, folder) in MV.items():
        clip((tmp_path / folder / video).with_suffix(".mp4"))
    items, notes = read_bench("mvbench", tmp_path)
    assert all((tmp_path / i.record.path).is_file() for i in items) and len(items) == 8


def test_a_folder_of_one_branch_completes_the_other(clip, tmp_path):
    """Branch `main` names NTU's videos .avi and lacks them; branch `video` has them as .mp4."""
    mvbench(tmp_path, clip)
    clip(tmp_path / "nturgbd_convert/S008.mp4")
    paths = {q.record.path for q in read_bench("mvbench", tmp_path)[0]}
    assert "nturgbd_convert/S008.mp4" in paths and "video/star/Charades_v1_480/K9UXS.mp4" in paths


def test_a_question_with_one_candidate_counts_and_blanks_do_not(clip, tmp_path):
    mvbench(tmp_path, clip)
    row = dict(video="video_14727.mp4", question="Which?", candidates=["The sphere."], answer="The sphere.")
    write_json(tmp_path / "json/counterfactual_inference.json", [row, row | dict(candidates=["a", "The sphere. "])])
    one, two = [q for q in read_bench("mvbench", tmp_path)[0] if q.groups["task"] == "counterfactual_inference"]
    assert (one.record.reference, two.record.reference) == ("A", "B") and two.record.options == ("a", "The sphere.")
    assert grade(one, "<answer>A</answer>") == ("A", 1.0)


@pytest.mark.parametrize("name", [name for name in BENCHES if name != "toy"])
def test_what_is_not_there_is_explained_with_the_commands_that_fetch_it(name, base, tmp_path):
    with pytest.raises(SystemExit) as ended:
        evaluation.main(["--bench", name, "--model", str(base), "--preset", "tiny", "--data", str(tmp_path / "none")])
    told, bench = str(ended.value), BENCHES[name]
    assert f"hf download {bench.repo} --repo-type dataset --local-dir" in told and bench.size in told
    assert ("accept the form" in told) == bench.gated and "unzip" in told


def test_a_missing_model_is_named_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        evaluation.main(["--bench", "mmvu", "--model", "models/Qwen2.5-VL-3B-Instruct"])
    assert "hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir models/Qwen2.5-VL-3B-Instruct" in str(ended.value)


@pytest.mark.parametrize("damage, complaint", [
    (lambda text: text[:-30], "cannot be read: "), (lambda text: "", "cannot be read: "),
    (lambda text: "7", "cannot be read: "),
    (lambda text: text.replace('"answer": "The clothes."', '"answer": "The moon."'), "question 1: ValueError"),
    (lambda text: text.replace('"candidates"', '"options"'), "question 1: KeyError: 'candidates'"),
    (lambda text: text.replace('["The table.", "The clothes.", "The towel."]', "3"), "question 1: ")])
def test_a_damaged_annotation_file_is_named_with_the_question(damage, complaint, clip, tmp_path):
    mvbench(tmp_path, clip)
    file = tmp_path / "json" / "moving_count.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match="moving_count.json") as ended:
        read_bench("mvbench", tmp_path)
    assert complaint in str(ended.value)


@pytest.mark.parametrize("wrong", [dict(ground_truth="several"), dict(options=["A. one"]), dict(scene_name="n" * 5000),
                                   dict(question="half a \ud83d"), dict(question_type=None)])
def test_a_question_that_could_not_be_scored_is_found_before_any_is_asked(wrong, clip, tmp_path):
    vsibench(tmp_path, clip)
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join([json.dumps(json.loads(lines[0]) | wrong), *lines[1:]]))
    with pytest.raises(ValueError, match="test.jsonl, question 1: "):
        read_bench("vsibench", tmp_path)


def test_one_broken_question_in_two_hundred_is_left_out_and_named(clip, tmp_path):
    mmvu(tmp_path, clip)
    row = json.loads((tmp_path / "validation.json").read_text())[0]
    rows = [row | {"id": f"validation_{i}"} for i in range(199)]
    write_json(tmp_path / "validation.json", [*rows, row | {"answer": "F"}])
    items, (*_, last) = read_bench("mmvu", tmp_path)
    assert len(items) == 199 and "LEFT OUT 1: " in last and "question 200: ValueError: the answer 'F'" in last


def test_one_broken_benchmark_does_not_stop_the_others(clip, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, build in (("mmvu", mmvu), ("vsibench", vsibench)):
        (tmp_path / "data" / name).mkdir(parents=True)
        build(tmp_path / "data" / name, clip)
    (tmp_path / "data" / "vsibench" / "test.jsonl").write_text("{")
    with pytest.raises(SystemExit) as ended:
        evaluation.main(["--bench", "all", "--model", str(base), "--preset", "tiny", "--out", "out", "--max-pixels",
                         "784", "--max-response", "4"])
    told = str(ended.value)
    assert "test.jsonl cannot be read" in told and told.count("--repo-type dataset") == 5
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert table[0][-4:] == ["Qwen2.5-VL-7B", "(paper)", "VideoP2R", "(paper)"]
    assert table[2] == ["mmvu*", "0.0", "60.0", "65.4"] and table[3] == ["mean", "0.0", "60.0", "65.4"]
