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
from eval import BENCHES, SEVEN, grade, read_bench


@pytest.fixture
def clip(toy):
    """clip("a/b.mp4") puts a clip there, clip("a/b.mp4", broken=True) something that is none."""
    source = next((toy / "heldout").glob("*.apng"))

    def put(path: Path, broken: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(2000) if broken else source.read_bytes())
    return put


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        data.write_rows(file, rows)
    else:
        file.write_text(json.dumps(rows))


def vsibench(root: Path, clip) -> None:
    rows = [("arkitscenes", "41069025", "object_counting", "How many table(s) are in this room?", "4", None),
            ("scannet", "scene0011_00", "object_rel_direction_easy", "Is the sofa left or right?", "B",
             ["A. left", "B. right"]),
            ("scannetpp", "09c1414f1b", "obj_appearance_order", "Which appears first?", "A", ["A. tv", "B. bed"]),
            ("scannet", "scene0999_00", "room_size_estimation", "What is the size of this room?", "23.5", None)]
    names = "dataset", "scene_name", "question_type", "question", "ground_truth", "options"
    write(root / "test.jsonl", [dict(zip(names, row)) | {"id": i} for i, row in enumerate(rows)])
    for dataset, scene, *_ in rows[:3]:                      # fault: one scene was not unpacked
        clip(root / dataset / f"{scene}.mp4")


def videommmu(root: Path, clip) -> None:
    ten = [f"{n} carbon atoms" for n in range(10)]
    row = dict(id="dev_Biology_3", question="<image 1> How many?", options=ten, answer="G")
    other = row | dict(id="validation_Basic_Medical_Science_2", options=["3, 4", "4, 3"], answer="A")
    hard = dict(id="validation_Math_15", question="<image 1> What is x?", options=None,
                answer="['24/7', '3.429', '3.43']")
    for track, rows in (("Perception", [row, other]), ("Comprehension", [row]), ("Adaptation", [other, hard])):
        write(root / track / "test-00000-of-00001.parquet", rows)
    clip(root / "Science/dev_Biology_3.mp4")
    clip(root / "Medicine/validation_Basic_Medical_Science_2.mp4", broken=True)       # fault: cannot be decoded
    clip(root / "Science/validation_Math_15.mp4")


def mmvu(root: Path, clip) -> None:
    url = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/{}"
    row = dict(id="validation_1", video=url.format("Computer_Science/0.mp4"), question_type="multiple-choice",
               metadata={"subject": "Computer Science"}, question="Which law?",
               choices={letter: f"{n} liters" for n, letter in enumerate("ABCDE")}, answer="C")
    write(root / "validation.json", [
        row, row | dict(id="validation_2", question_type="open-ended", choices=dict.fromkeys("ABCDE", ""), answer="5"),
        row | dict(id="validation_3", video=url.format("Art/17.mp4"), metadata={"subject": "Art"})])
    clip(root / "videos/Computer_Science/0.mp4")             # fault: Art/17.mp4 did not come


def vcrbench(root: Path, clip) -> None:
    row = {"id": 3, "video_path": "video/videoEspresso/Law.Abiding.Citizen.2009__#01-14-42_label_G-0-0.mp4",
           "duration": 56, "dimension": "Video Plot Analysis",
           "question": "Why did the man leave?A. He was late\nB. He was hungry\n",
           "multiple-choice": True, "choices": {"A": "He was late", "B": "He was hungry"}, "answer": "B"}
    other = row | {"id": 5, "question": "Why did she stay?", "duration": 301, "video_path": "video/mmvu/#2.mp4"}
    rows = [row, row | {"id": 4, "multiple-choice": False, "choices": {}, "answer": "[3, 7]"}, other]
    write(root / "v1/videos/meta_info_video.json", rows)     # fault: # in the names, and one question does not hold
    for row in rows:                                         # its options
        clip(root / "v1/videos" / row["video_path"])


MV = {"action_sequence": "K9UXS.mp4", "episodic_reasoning": "castle/s07e03", "fine_grained_pose": "S008.avi",
      "moving_count": "video_14727.mp4"}


def mvbench(root: Path, clip) -> None:
    """The layout of branch `main`: raw videos under video/, frame folders."""
    for task, video in MV.items():
        row = dict(video=video, question="Which object was tidied up?", answer="The clothes.",
                   candidates=["The table.", "The clothes.", "The towel."])
        write(root / "json" / f"{task}.json", [row] * 2)
    clip(root / "video/star/Charades_v1_480/K9UXS.mp4")
    frames = root / "video/tvqa/frames_fps3_hq/castle/s07e03"
    frames.mkdir(parents=True)
    for i in range(12):                                      # 4 s
        data.Image.new("RGB", (28, 28)).save(frames / f"{i:05d}.jpg")
    clip(root / "video/data0613/clevrer/video_validation/video_14727.mp4")    # a video of the supplement
    # fault: fine_grained_pose has no videos in this branch


def tempcompass(root: Path, clip) -> None:
    rows = {"multi-choice": [("1034419625_reverse", "action", "A. dunking a basketball",
                              "What is the man doing?\nA. dunking a basketball\nB. passing a basketball")],
            "yes_no": [("1034419625_reverse", "speed", "yes", "Is it fast?"),
                       ("1034419625_reverse", "speed", "no", "Is it slow?")],
            "caption_matching": [
                ("77", "order", "Option 2: A man is falling.",
                 "Which description fits?\nOption 1: A man is jumping.\nOption 2: A man is falling."),
                ("1034419625_reverse", "order", "Caption B: It shrinks.",
                 "Which caption fits?\nCaption A: It grows.\nCaption B: It shrinks.")]}
    for part, questions in rows.items():
        write(root / part / "test-00000-of-00001.parquet",
              [dict(zip(("video_id", "dim", "answer", "question"), row)) for row in questions])
    clip(root / "videos/1034419625_reverse.mp4")             # fault: 77.mp4 did not come


def videomme(root: Path, clip) -> None:
    row = dict(duration="short", domain="Knowledge", videoID="-fFjv93ACGo", question_id="001-1",
               task_type="Counting Problem", answer="C", question="What is on the tree?",
               options=["A. Apples.", "B. Candles.", "C. Berries.", "D. The three kinds are of the same number."])
    write(root / "videomme/test-00000-of-00001.parquet", [
        row, row | dict(question_id="001-2", task_type="OCR Problems", answer="D"),
        row | dict(question_id="700-1", videoID="jRS9fVh7MUw", duration="long")])
    clip(root / "data/-fFjv93ACGo.MP4")
    clip(root / "data/jRS9fVh7MUw.mp4", broken=True)         # fault: a mirror's file without a frame


#           builder, questions read, media missing or broken, what its table must say
EXPECTED = {"vsibench": (vsibench, 4, 1, ["INCOMPLETE: 1 of 4 (25.0%)", "no such file", "30.1", "36.8"]),
            "videommmu": (videommmu, 5, 2, ["cannot be decoded", "Perception", "Adaptation", "Medicine"]),
            "mmvu": (mmvu, 2, 1, ["Computer Science", "20.0"]),
            "vcrbench": (vcrbench, 2, 0, ["Video Plot Analysis", "over 300 s", "50.0"]),
            "mvbench": (mvbench, 8, 2, ["33.3"]),
            "tempcompass": (tempcompass, 5, 1, ["closed formats, pooled", "yes_no", "mean of formats", "50.0"]),
            "videomme": (videomme, 3, 1, ["short", "without subtitles", "25.0"])}


def run(name: str, base: Path, *flags) -> None:
    evaluation.main(["--bench", name, "--model", str(base), "--preset", "tiny", "--max-pixels", "784",
                     "--max-response", "6", *map(str, flags)])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_miniature_is_read_answered_and_counted(name, clip, base, tmp_path, capsys):
    build, questions, lost, said = EXPECTED[name]
    build(tmp_path / name, clip)
    run(name, base, "--data", tmp_path / name, "--out", tmp_path)
    out = capsys.readouterr().out
    for words in (*said, f"{questions} questions in", f"NOT the benchmark's {BENCHES[name].expected} questions",
                  f"{questions - lost} questions scored", f"not asked: {lost}.", "at most 32, of 784 pixels"):
        assert words in out
    rows = evaluation.read_rows(tmp_path / name).values()
    answered = [r for r in rows if "missing" not in r]
    assert (len(rows), len(answered)) == (questions, questions - lost)
    for r in answered:
        assert (r["frames"], r["pixels"]) == (8 if "tvqa" in r["clip"] else 6, [28, 28])


@pytest.fixture
def questions(clip, tmp_path):
    """questions(name): id → question of a miniature."""
    def read(name: str) -> dict:
        build, *_ = EXPECTED[name]
        build(tmp_path / name, clip)
        items, _ = read_bench(name, tmp_path / name)
        return {i.record.problem_id: i for i in items}
    return read


def prompt(question) -> str:
    """What the model reads."""
    return data.instruction(question.record, data.InputSettings(prompt="short"))


@pytest.mark.parametrize("name, key, shown", [
    ("vcrbench", "3", "Why did the man leave?\nOptions:\nA. He was late\nB. He was hungry\n"),
    ("vcrbench", "5", "Why did she stay?\nOptions:\nA. He was late\nB. He was hungry\n"),
    ("videomme", "001-1", "What is on the tree?\nOptions:\nA. Apples.\nB. Candles.\nC. Berries."),
    ("mmvu", "validation_1", "Which law?\nOptions:\nA. 0 liters\nB. 1 liters"),
    ("videommmu", "Perception/validation_Basic_Medical_Science_2", "\nOptions:\nA. 3, 4\nB. 4, 3\n"),
    ("videommmu", "Perception/dev_Biology_3", "\nPlease ignore the Quiz question in last frame"),
    ("videommmu", "Adaptation/validation_Math_15",
     "following open-ended question. The image for this question is at the end")])
def test_options_are_shown_once_and_questions_keep_the_sentences_that_belong_to_them(name, key, shown, questions):
    assert shown in prompt(questions(name)[key])


def test_yes_and_no_and_captions_become_choices_between_texts(questions):
    items = questions("tempcompass")
    shown = {key.rsplit("/", 1)[0]: prompt(item) for key, item in items.items()}
    assert shown["multi-choice/1034419625_reverse/action"].count("dunking") == 1
    assert "Is it slow?\nOptions:\nA. yes\nB. no" in shown["yes_no/1034419625_reverse/speed"]
    assert "fits?\nOptions:\nA. A man is jumping.\nB. A man is falling." in shown["caption_matching/77/order"]
    assert [i.record.reference for i in items.values()] == ["A", "A", "B", "B", "B"]


def test_each_kind_of_question_has_its_metric(questions):
    items = questions("videommmu")
    assert items["Adaptation/validation_Basic_Medical_Science_2"].groups["discipline"] == "Medicine"
    assert grade(items["Adaptation/validation_Math_15"], "<answer>x is 3.43</answer>")[1] == 1
    items = questions("vsibench")
    assert grade(items["0"], "<answer>5</answer>") == ("5", 0.6)
    assert grade(items["1"], "It is on the right.") == ("B", 1.0)


def test_videos_of_the_other_branch_of_mvbench_are_found(clip, tmp_path):
    """Branch `video` holds clips that are cut already, and NTU's, named .avi, as .mp4."""
    mvbench(tmp_path, clip)
    shutil.rmtree(tmp_path / "video")
    there = {"star/Charades_segment/K9UXS.mp4", "nturgbd_convert/S008.mp4"}
    for path in there:
        clip(tmp_path / path)
    assert there <= {q.record.path for q in read_bench("mvbench", tmp_path)[0]}


def test_a_question_with_one_candidate_counts_and_blanks_do_not(clip, tmp_path):
    mvbench(tmp_path, clip)
    row = dict(video="x.mp4", question="Which?", candidates=["The sphere."], answer="The sphere.")
    write(tmp_path / "json/egocentric_navigation.json", [row, row | dict(candidates=["a", "The sphere. "])])
    *_, one, two = read_bench("mvbench", tmp_path)[0]
    assert grade(one, "<answer>A</answer>") == ("A", 1)
    assert grade(two, "<answer>B</answer>") == ("B", 1)


def test_flags_count_more_than_the_protocol_and_that_more_than_the_models_run(tmp_path):
    saved = dict(preset="tiny", frames=6, template="think", prompt="short")
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    s = evaluation.find_settings(tmp_path, evaluation.parse_args(["--bench", "mmvu", "--prompt", "full"]))
    assert (s.frames, s.max_pixels, s.template, s.prompt) == (32, 256 * 28 * 28, "think", "full")


@pytest.mark.parametrize("name", SEVEN)
def test_what_is_not_there_is_explained_with_the_commands_that_fetch_it(name, base, tmp_path):
    with pytest.raises(SystemExit) as ended:
        run(name, base, "--data", tmp_path / "none")
    told, bench = str(ended.value), BENCHES[name]
    assert f"hf download {bench.repo} --repo-type dataset --local-dir" in told and bench.size in told
    assert ("accept the form" in told) == bench.gated and "unzip" in told


def test_a_missing_model_is_named_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = "models/Qwen2.5-VL-3B-Instruct"
    with pytest.raises(SystemExit, match=f"hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir {folder}"):
        run("mmvu", folder)


@pytest.mark.parametrize("wrong", [
    dict(ground_truth="several"), dict(options=["A. one"]), dict(options=3), dict(scene_name="n" * 5000),
    dict(question="half a \ud83d"), dict(question_type=None), dict(options=["A. x", "C. y"], ground_truth="A")])
def test_a_question_that_could_not_be_scored_is_found_before_any_is_asked(wrong, clip, tmp_path):
    vsibench(tmp_path, clip)
    first, *others = evaluation.read_annotations(tmp_path / "test.jsonl")
    write(tmp_path / "test.jsonl", [first | wrong, *others])
    with pytest.raises(ValueError, match="test.jsonl, question 1: "):
        read_bench("vsibench", tmp_path)


def test_one_broken_question_in_two_hundred_is_left_out_and_named(clip, tmp_path):
    mmvu(tmp_path, clip)
    row, *_ = evaluation.read_annotations(tmp_path / "validation.json")
    write(tmp_path / "validation.json", [row] * 199 + [row | {"answer": "F"}])
    items, (*_, last) = read_bench("mmvu", tmp_path)
    assert len(items) == 199 and "LEFT OUT 1: " in last and "question 200: ValueError: the answer 'F'" in last


def test_one_broken_benchmark_does_not_stop_the_others(clip, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mmvu(tmp_path / "data/mmvu", clip)
    (tmp_path / "data/vsibench").mkdir()
    (tmp_path / "data/vsibench/test.jsonl").write_text("{")
    with pytest.raises(SystemExit) as ended:
        run("all", base, "--out", "out")
    told = str(ended.value)
    assert "test.jsonl cannot be read" in told and told.count("--repo-type dataset") == 5
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert table[0][-4:] == ["Qwen2.5-VL-7B", "(paper)", "VideoP2R", "(paper)"]
    assert table[2] == ["mmvu*", "0.0", "60.0", "65.4"] and table[3] == ["mean", "0.0", "60.0", "65.4"]
