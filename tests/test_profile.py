"""The profile's file, and the pictures that are drawn of it."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from profiles import CONFIG, HERE, counted, full_profile, profile

from specsa_jax.planning import show
from specsa_jax.planning.outlook import of_drafts
from specsa_jax.planning.predict import logit, sigmoid
from specsa_jax.planning.profile import (
    ProfileError,
    default_path,
    load,
    read,
    save,
)


@pytest.fixture
def full():
    return full_profile()


def test_a_profile_comes_back_as_it_was_kept(tmp_path, full):
    path = save(default_path(tmp_path, "NVIDIA H100 80GB HBM3"), full)
    assert path == tmp_path / "profile-nvidia-h100-80gb-hbm3.json"
    assert load(path, **HERE) == full
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_profile_of_another_model_device_or_engine_is_refused_with_the_reason(tmp_path, full):
    path = save(tmp_path / "profile.json", full)
    for changed, reason in (
        ({"fingerprint": "xyz"}, "another model.*abc.*expected xyz"),
        ({"device": "TPU v4"}, "device: got 'cpu', expected 'TPU v4'.*--allow-mismatch"),
        ({"dtype": "bfloat16"}, "dtype: got 'float32', expected 'bfloat16'"),
        ({"implementation": "pallas"}, "implementation: got 'xla', expected 'pallas'"),
    ):
        with pytest.raises(ProfileError, match=reason):
            load(path, **{**HERE, **changed})
        if "fingerprint" not in changed:
            assert load(path, **{**HERE, **changed}, allow_mismatch=True) == full
    with pytest.raises(ProfileError, match="another model"):
        load(path, fingerprint="xyz", device="cpu", allow_mismatch=True)


def test_a_damaged_file_is_refused_with_the_place_of_the_damage(tmp_path, full):
    path = save(tmp_path / "profile.json", full)
    text = path.read_text()
    values = json.loads(text)
    first = values["steps"][0]
    for broken, reason in (
        (text[: len(text) // 2], "truncated or damaged"),
        ("[]", "schema: got None, expected 2"),
        (json.dumps({**values, "schema": 1}), "schema: got 1, expected 2"),
        (json.dumps({**values, "more": 1}), "expected the fields fingerprint"),
        (json.dumps({n: v for n, v in values.items() if n != "drafts"}), "expected the fields"),
        (json.dumps({**values, "bandwidth": float("nan")}), "Profile.bandwidth: got nan, expected float"),
        (json.dumps({**values, "bandwidth": 0.0}), "Profile.bandwidth: got 0.0, expected at least 1"),
        (json.dumps({**values, "overhead": 2.0}), "Profile.overhead: got 2.0, expected seconds, above 0 and at most"),
        (json.dumps({**values, "implementation": "cuda"}), "implementation: got 'cuda', expected 'xla' or 'pallas'"),
        (json.dumps({**values, "steps": {}}), "Profile.steps: got {}, expected tuple"),
        (json.dumps({**values, "steps": [{**first, "low": 1e9}]}), "expected 0 < low <= seconds <= high"),
        (json.dumps({**values, "steps": [{**first, "point": {**first["point"], "width": 0}}]}), "width: got 0"),
        (json.dumps({**values, "steps": [{**first, "point": {**first["point"], "width": True}}]}),
         r"Profile.steps\[0\].point.width: got True, expected int"),
        ("[" * 100_000, "truncated or damaged"),
        (json.dumps({**values, "bandwidth": 10**400}), "Profile.bandwidth: got 1000*, expected float"),
        *((json.dumps({**values, "steps": [first, {**first, "point": {**first["point"], **changed}}]}),
           rf"Profile.steps\[1\].point{reason}") for changed, reason in (
            ({"context": 10**400}, ".context: got 1000*, expected int of at most"),
            ({"sharing": {**first["point"]["sharing"], "schedule": "ZZ"}}, ".sharing: schedule: got 'ZZ', expected"),
            ({"sharing": {**first["point"]["sharing"], "schedule": "SF"}}, ".sharing: schedule: got 'SF', expected"),
            ({"sharing": {**first["point"]["sharing"], "group": -4}}, ".sharing: group: got -4, expected an integer"),
        )),
        (json.dumps({**values, "priors": [{**values["priors"][0], "steps": 11}]}), "add up to 11 steps"),
        (json.dumps({**values, "priors": [{**values["priors"][0], "accepted": [2, 0, 8]}]}),
         r"Profile.priors\[0\]: Prior.accepted: got \(2, 0, 8\), expected no more than was drafted, \(3, 0, 7\)"),
        *((json.dumps({**values, name: [{**values[name][0], "tree": "star"}]}),
           rf"Profile.{name}\[0\]: tree: got 'star'") for name in ("priors", "drafts")),
    ):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(ProfileError, match=f"(?s)profile.json.*{reason}"):
            read(path)
    with pytest.raises(ProfileError, match="expected a readable file"):
        read(tmp_path / "absent.json")


def test_a_writer_that_is_killed_leaves_the_file_that_was_there(tmp_path, full, monkeypatch):
    path = save(tmp_path / "profile.json", full)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(path, profile())
    assert read(path) == full
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# Begins, for each line that it is given, a process that writes profiles over one until it is killed.
WRITERS = """
import dataclasses, itertools, os, sys
from pathlib import Path
from specsa_jax.planning.profile import read, save

path = Path(sys.argv[1])
first = read(path)
for _ in sys.stdin:
    pid = os.fork()
    if not pid:
        for digit in itertools.cycle("123456789"):
            save(path, dataclasses.replace(first, device=digit, versions={"long": digit * 10**6}))
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""


def test_whenever_a_writer_is_killed_the_file_is_a_whole_one(tmp_path):
    """By SIGKILL at random moments, until 3 of them were in the middle of a write, which leaves its part beside."""
    path, random = save(tmp_path / "profile.json", profile()), np.random.default_rng(0)
    with subprocess.Popen([sys.executable, "-c", WRITERS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, bufsize=1) as writers:  # fmt: skip
        for _ in range(100):
            print(file=writers.stdin)
            pid = int(writers.stdout.readline())
            time.sleep(random.uniform(0.0, 0.03))
            os.kill(pid, signal.SIGKILL)
            assert writers.stdout.readline() == "ended\n"
            found = read(path)
            assert found in (profile(), profile(device=found.device, versions={"long": found.device * 10**6}))
            if len(list(tmp_path.iterdir())) > 3:
                break
    assert len(list(tmp_path.iterdir())) > 3 and writers.returncode == 0 and found != profile()


def test_expected_tokens_follow_the_law_of_acceptance():
    for a in (0.0, 0.5, 0.9):
        np.testing.assert_allclose(show.expected_tokens("chain:4", a), sum(a**n for n in range(5)))
    # Two children: the second catches half as much of what the first leaves.
    np.testing.assert_allclose(show.expected_tokens("2-1", 0.5), 1 + 0.625 + 0.625 * 0.5)
    # The likeliest: 0.8, 0.8², 0.8³, and so on, until a sibling is likelier.
    np.testing.assert_allclose(show.expected_tokens("best:3:3", 0.8), 1 + 0.8 + 0.64 + 0.512)
    assert show.expected_tokens("best:8:2", 0.3) > show.expected_tokens("chain:2", 0.3)


def test_drafts_win_where_enough_of_them_stands():
    trees = ("chain:2", "chain:8")
    best = show.best_trees(counted(), "lookup", trees, 1, (2048,), (0.0, 0.4, 0.97))
    assert best[0, 0] == len(trees)  # one token at a time
    assert best[2, 0] == 1


class PerToken:
    """A step takes 1 and 0.1 for each drafted token; drafts of the head 0.4."""

    def step(self, point):
        return 1.0 + 0.1 * (point.width - 1)

    def draft(self, drafter, *_):
        return 0.4 * (drafter == "head")


def test_of_all_drafters_the_one_wins_whose_drafts_are_worth_their_time():
    """Lookup, which costs nothing, has a draft in 9 of 10 steps, whose tokens stand with chance 0.3; the head always,
    with 0.7. Their log-odds are opposite, so a mean chance of 0.5 is that of the priors."""
    drafts = [("lookup", "chain:4"), ("head", "chain:2"), ("head", "chain:4")]
    rates, stood = {"lookup": 0.9, "head": 1.0}, {"lookup": 0.3, "head": 0.7}

    class Acceptance:
        def chances(self, drafter, tree, depth):
            return np.full(depth, stood[drafter])

        def outlook(self, drafter, tree, depth, shift):
            return of_drafts(sigmoid(logit(np.full(64, stood[drafter])) + shift), rates[drafter], depth)

    def best(mean, batch=1, among=drafts):
        return show.best_drafts(PerToken(), Acceptance(), among, batch, (512, 2048), mean).tolist()

    def expected(mean):
        odds = {name: mean / (1 - mean) * chance / (1 - chance) for name, chance in stood.items()}
        lookup, head = (odds[name] / (1 + odds[name]) for name in ("lookup", "head"))
        tokens = [1 + 0.9 * sum(lookup**n for n in range(1, 5)), *(sum(head**n for n in range(k)) for k in (3, 5)), 1]
        return int(np.argmax(np.array(tokens) / [0.9 * 1.4 + 0.1, 1.2 + 0.4, 1.4 + 0.4, 1.0]))

    means = (0.05, 0.3, 0.6, 0.8, 0.97)
    assert best(means) == [[expected(mean)] * 2 for mean in means]
    assert {expected(mean) for mean in means} == {0, 1, 2, 3}
    # In a batch of many somebody always has a draft, so that each step takes its whole time.
    rates["lookup"] = 0.5
    assert [best((0.4,), batch, drafts[:1])[0][0] for batch in (1, 99)] == [0, 1]


def test_the_page_is_whole_by_itself(tmp_path, full):
    page, *pictures = show.write(full, CONFIG, tmp_path / "profile.html")
    text = page.read_text()
    names = ("steps", "regions", "winners", "overlap")
    assert {path.name for path in pictures} == {f"profile-{name}.png" for name in names}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert text.count("data:image/png;base64,") == 4
    assert not re.search(r"<script|<link|(src|href)\s*=\s*[\"'](?!data:)|@import|url\(", text)
    assert "FSFSFS" in text and "relative error 1.0% median" in text
    show.write(dataclasses.replace(full, overlaps=(), drafts=(), priors=()), CONFIG, tmp_path / "few.html")
    assert {path.name for path in tmp_path.glob("few-*")} == {"few-steps.png", "few-regions.png"}
    assert "Not measured." in (tmp_path / "few.html").read_text()
