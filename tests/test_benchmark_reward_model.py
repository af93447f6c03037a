"""The benchmark of a reward model: the answers it is trained on, its scores, and what is made of held-out answers."""

import json
import random

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import reward_model, sum_classifier
from recipe.spin.examples.arithmetic.prepare import prepare


def test_the_sums_are_the_examples(tmp_path):
    prepare(tmp_path)
    for part, pairs in zip(("train", "test"), sum_classifier.sums(), strict=True):
        rows = pq.read_table(tmp_path / f"{part}.parquet").to_pylist()
        assert [row["prompt"][0]["content"] for row in rows] == [sum_classifier.question(a, b) for a, b in pairs]


@pytest.mark.parametrize("seed", range(40))
def test_right_answers_are_right_and_wrong_ones_wrong(seed):
    rng = random.Random(seed)
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    right, wrong = sum_classifier.right_answers(a, b, rng), sum_classifier.wrong_answers(a, b, rng)
    assert len(right) == sum_classifier.RIGHT and all(sum_classifier.is_right(answer, a, b) for answer in right)
    assert len(wrong) == sum_classifier.WRONG and not any(sum_classifier.is_right(answer, a, b) for answer in wrong)


def test_scores_are_those_of_whole_conversations_as_the_reward_loop_sends_them(tiny_llama):
    classifier = sum_classifier.SumClassifier(str(tiny_llama))
    requests = ["what is 3 + 4", "and 17 + 20"]
    answers = [["7", "the sum of 3 and 4 is 8"], ["37 or so", "38"]]
    with torch.no_grad():
        scores = classifier.scores(requests, answers)
        for number, request in enumerate(requests):
            for place, answer in enumerate(answers[number]):
                chat = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
                text = classifier.tokenizer.apply_chat_template(chat, add_generation_prompt=False, tokenize=False)
                tokens = classifier.tokenizer.encode(text, add_special_tokens=False)
                alone = classifier.model(torch.tensor([tokens])).logits.item()
                assert scores[number, place].item() == pytest.approx(alone, abs=1e-4)
    assert scores.unique().numel() == 4


def test_training_puts_right_answers_first(tiny_llama, monkeypatch):
    """On one sum, which a tiny model can learn by heart."""
    monkeypatch.setattr(sum_classifier, "sums", lambda: ([(3, 4)], []))
    monkeypatch.setattr(sum_classifier, "PROMPTS", 1)
    monkeypatch.setattr(sum_classifier, "LEARNING_RATE", 3e-3)
    torch.manual_seed(0)
    order = sum_classifier.train(sum_classifier.SumClassifier(str(tiny_llama)), steps=40)
    assert len(order) == 40 and sum(order[-5:]) / 5 > 0.85 > 0.7 > sum(order[:3]) / 3


def test_held_out_answers_are_graded_by_the_rule(tmp_path):
    answers = [
        ("a_0_0", "7", 2.0),  # sampled, right
        ("a_1_0", "8", 1.0),
        ("a_2_0", "or 9", 3.0),
        ("b_0_0", "it is 7", -1.0),  # greedy, right
        ("c_0_0", "1", 0.0),
        ("c_1_0", "2", 0.5),
        ("c_2_0", "3", 0.5),
        ("d_0_0", "1", 0.0),  # greedy
    ]
    file = tmp_path / "0.jsonl"
    lines = [{"uid": uid, "output": text, "gts": "7", "score": score} for uid, text, score in answers]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert reward_model.grade(file) == {"sampled": 0.1667, "greedy": 0.5, "order": 0.5}
    file.write_text("\n".join(map(json.dumps, lines[4:])))
    assert reward_model.grade(file) == {"sampled": 0.0, "greedy": 0.0, "order": None}


def test_a_reward_model_is_made_once(tmp_path, monkeypatch):
    made = []

    def make(model, folder, steps):
        folder.mkdir()
        made.append(folder)
        return {"steps": steps}

    monkeypatch.setattr(sum_classifier, "make", make)
    monkeypatch.setattr(reward_model, "make_missing", lambda: None)
    found = [reward_model.classifier(tmp_path / "classifier") for _ in range(2)]
    assert found == [{"steps": reward_model.UPDATES}] * 2 and made == [tmp_path / "classifier"]
