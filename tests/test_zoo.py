"""The zoo: its runner, its list, and a few of its models, measured in full."""

import dataclasses
import json
import os
import signal
import time

import pytest
import torch
from torch import nn

import benchmarks.zoo.__main__ as zoo
from benchmarks.zoo import Entry, entries, pages, peers, runner, unseen, vision
from benchmarks.zoo.measure import Row, causes, measure
from dmscale import certify, trace


def row(name, status="exact", **more):
    return Row(name, "family", status, **more).to_dict()


class Unknown(nn.Module):
    """A plain network with an operator that no rule knows."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.first(x)
        return self.last(self.second(torch.linalg.solve(torch.eye(len(y)), y)))


def entry(name, build=None, requires=""):
    return Entry(
        name,
        "family",
        build or (lambda: (nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), torch.randn(2, 3))),
        requires,
    )


FAST = [
    "own:graph network", "own:Conv3d video network", "own:Conv1d temporal network", "own:GRU classifier",
    "own:LSTM classifier, bidirectional", "timm:starnet_s050", "timm:test_vit4", "torchvision:shufflenet_v2_x0_5",
]  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_a_fast_part_of_the_zoo_is_exact(name):
    (chosen,) = runner.chosen(entries(), name)
    if chosen.requires:
        pytest.importorskip(chosen.requires)
    got = measure(chosen)
    assert (got.status, got.problem) == ("exact", "")
    assert got.dimensions and got.half_macs < 0.9


def test_models_that_nobody_chose_are_none_of_the_list():
    pytest.importorskip("timm")
    listed = {e.name for e in entries()}
    drawn = [e.name for e in unseen.timm_entries(20, seed=3)]
    assert len(set(drawn)) == 20 and not listed & set(drawn)
    assert drawn == [e.name for e in unseen.timm_entries(20, seed=3)]
    assert drawn != [e.name for e in unseen.timm_entries(20, seed=4)]
    pytest.importorskip("transformers")
    kinds = {e.name: e for e in unseen.transformers_entries()}
    assert len(kinds) > 100 and not listed & kinds.keys()

    def large():
        raise unseen.LeftOut("909 M parameters")

    chosen = [kinds["hf:camembert"], Entry("hf:large", "transformers", large)]
    small, left_out = runner.run(chosen, unseen._measured, limit=100)
    assert small["built"] and small["status"] == "exact" and not left_out["built"]
    page = unseen.page([small, left_out], seed=3)
    assert "**1 of 1 models exact" in page and "2 tried; left out: 1 too large." in page


def test_every_file_of_timm_has_an_entry():
    import timm

    assert set(timm.list_modules()) == set(vision.TIMM)


def test_names_are_unique_and_the_list_is_sorted(monkeypatch):
    names = [(e.family, e.name) for e in entries()]
    assert names == sorted(names) and len(names) > 140
    monkeypatch.setattr(vision, "ENTRIES", [entry("a"), entry("a")])
    with pytest.raises(ValueError, match="'a'"):
        entries()


def test_the_baseline_names_models_of_the_list():
    names = {e.name for e in entries()}
    known = [name for name in zoo.read_baseline() if name.partition(":")[0] != "hf"]
    assert len(known) > 40 and set(known) <= names


# -- measuring -------------------------------------------------------------------------------------------------


def test_a_row_says_what_is_free_and_what_an_unknown_operator_froze():
    got = measure(entry("unknown", lambda: (Unknown(), torch.randn(3, 4))))
    assert got.status == "exact" and got.dimensions == {"width": 1} and got.frozen == 2
    (operator,) = got.unknown
    assert got.frozen_by_unknown == {operator: ["first"]}
    # of 40 + 54 + 14 parameters, 4 -> 8 and its bias stay, and of 8 -> 6, which may go down to 8 -> 1, what it takes
    assert got.causes == {
        f"no rule for the operator ({operator})": 40 / 108, f"no rule for {operator}": 8 / 108,
        "an axis of the model's output": 4 / 108,
    }  # fmt: skip
    # `second` can go down to one: 5/6 of its weight and bias and of the columns of the last
    assert got.free_params == pytest.approx((54 + 12) * 5 / 6 / 108)


def test_a_wrong_count_is_inexact(monkeypatch):
    monkeypatch.setattr("benchmarks.zoo.measure.counted_macs", lambda model, inputs, without=(): 1)
    got = measure(entry("plain"))
    assert got.status == "inexact" and "counted 1" in got.problem and not got.macs_equal


def test_what_is_raised_becomes_a_row():
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("gone")

    refused = measure(entry("broken", lambda: (Broken(), torch.randn(2))))
    assert refused.status == "refused" and "Broken.forward failed" in refused.problem
    crashed = measure(entry("unbuilt", lambda: 1 / 0))
    assert crashed.status == "crashed" and "division by zero" in crashed.problem


def test_causes_name_no_place_and_natural_reasons_where_there_is_no_other():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    found = causes(trace(model, torch.randn(1, 3, 8, 8)))  # of 112 + 74 parameters; the first may have one channel
    assert found == {"an axis of the model's input": 27 / 186, "an axis of the model's output": 20 / 186}
    page = pages.zoo_page([row("m", causes=found, free_params=0.9)], 3)
    assert page.count("the model's input") == 1 and "an axis of the model's input: 14.5% |" in page

    class Cumulative(nn.Module):
        def forward(self, x):
            return x.cumsum(-1)

    model = nn.Sequential(nn.Linear(3, 4), Cumulative(), nn.Linear(4, 2))
    assert list(causes(trace(model, torch.randn(1, 3)))) == ["cumulative (cumsum)", "an axis of the model's output"]


# -- what the zoo has taught -----------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Loop(nn.Module):
    """Blocks in a list; what `between` says happens after each of them."""

    def __init__(self, blocks, between):
        super().__init__()
        self.blocks, self.between = nn.ModuleList(Residual() for _ in range(blocks)), between
        self.stem, self.position, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.between == "always" or (self.between == "after the first" and i == 0):
                x = self.position(x)
        return self.head(x)


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("between, offered", [("never", True), ("always", False), ("after the first", False)])
def test_depth_is_offered_unless_the_loop_calls_a_module_in_between(blocks, between, offered):
    """Twins adds its positions after block 0; without it they would come after another one, and "always" once less."""
    space = trace(Loop(blocks, between), torch.randn(2, 4))
    assert ("blocks depth" in space.dimensions) == offered
    structure = space.sample(seed=1)
    assert certify.compare(space.gate(structure), space.export(structure), torch.randn(2, 4)) < 1e-5


class Biased(nn.Module):
    """LeViT's attention biases: a dict keeps what an evaluation has computed from parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.biases, self.attention_bias_cache = nn.Parameter(torch.randn(8)), {}

    def forward(self, x):
        if "cpu" not in self.attention_bias_cache:
            self.attention_bias_cache["cpu"] = self.biases * 2
        return self.last((self.first(x) + self.attention_bias_cache["cpu"]).relu())


def test_a_model_that_has_run_is_traced_and_exported_without_its_cached_biases():
    model, x = Biased().eval(), torch.randn(2, 4)
    with torch.no_grad():
        model(x)
    space = trace(model, x)
    assert {n: d.size for n, d in space.dimensions.items()} == {"first": 8}
    structure = space.structure({"first": 3})
    assert certify.compare(space.gate(structure), space.export(structure), x) < 1e-5
    assert model.attention_bias_cache["cpu"].shape == (8,)


# -- running ---------------------------------------------------------------------------------------------------


def quick(e):
    if e.name == "slow":
        time.sleep(60)
    if e.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return row(e.name)


def test_each_entry_runs_in_a_process_of_its_own_under_a_limit():
    given = [entry(n) for n in ("a", "slow", "killed", "b")] + [entry("absent", requires="no_such_package_here")]
    got = {r["name"]: r for r in runner.run(given, quick, limit=3, jobs=2)}
    assert {n: r["status"] for n, r in got.items()} == {
        "a": "exact", "b": "exact", "slow": "timeout", "killed": "crashed", "absent": "skipped",
    }  # fmt: skip
    assert "exit code -9" in got["killed"]["problem"] and "no_such_package_here" in got["absent"]["problem"]


def in_steps(e):
    yield row(e.name, "compared")
    yield {**row(e.name, "compared"), "first": 1}
    quick(e)
    yield {**row(e.name, "compared"), "first": 1, "second": 2}


def test_what_is_known_of_a_row_stays_where_its_process_ends():
    given = [entry(n) for n in ("a", "slow", "killed")]
    got = {r["name"]: r for r in runner.run(given, in_steps, limit=3, jobs=2)}
    assert {n: (r["status"], r["first"], r.get("second")) for n, r in got.items()} == {
        "a": ("compared", 1, 2), "slow": ("timeout", 1, None), "killed": ("crashed", 1, None),
    }  # fmt: skip


def test_rows_of_the_same_code_are_kept_and_others_are_not(tmp_path):
    path = tmp_path / "runs" / "zoo.jsonl"
    first = runner.Results(path, "code 1")
    first.add(row("a", "inexact"))
    first.add(row("a"))
    first.add(row("b"))
    with path.open("a") as file:
        file.write('{"name": "c", "sta')  # a run that was killed while it wrote
    assert {n: r["status"] for n, r in runner.Results(path, "code 1").rows.items()} == {"a": "exact", "b": "exact"}
    assert runner.Results(path, "code 2").rows == {}


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    given, measured = [entry("a"), entry("b"), entry("c")], []

    def counting(todo, *rest):
        measured.append([e.name for e in todo])
        for e in todo:
            yield row(e.name)

    monkeypatch.setattr(zoo, "entries", lambda: given)
    monkeypatch.setattr(zoo, "read_baseline", dict)
    monkeypatch.setattr(runner, "run", counting)
    options = ["--results", str(tmp_path / "zoo.jsonl"), "--out", str(tmp_path)]
    assert zoo.main([*options, "--filter", "b"]) == 0
    assert not (tmp_path / "zoo.md").exists()  # a part of the zoo is no page
    assert zoo.main(options) == 0 and zoo.main(options) == 0
    assert measured == [["b"], ["a", "c"], []]
    assert "**3 of 3 models exact (100.0%).**" in (tmp_path / "zoo.md").read_text()
    assert "every operator that the zoo ran has a rule" in (tmp_path / "unsupported.md").read_text()
    assert zoo.main([*options, "--filter", "nothing"]) == 1
    assert "families: family" in capsys.readouterr().out


@pytest.mark.parametrize(
    "status, problem, code",
    [("exact", "", 0), ("inexact", "differ by 1", 1), ("refused", "no", 1), ("crashed", "oh", 1), ("skipped", "", 0)],
)
def test_a_model_that_worked_before_and_does_not_now_fails_the_run(
    tmp_path, monkeypatch, capsys, status, problem, code
):
    monkeypatch.setattr(zoo, "entries", lambda: [entry("a"), entry("b")])
    monkeypatch.setattr(zoo, "BASELINE", tmp_path / "baseline.json")
    zoo.BASELINE.write_text(json.dumps({"a": "exact", "b": "refused", "gone": "exact"}))
    found = {"a": row("a", status, problem=problem), "b": row("b", "refused")}
    monkeypatch.setattr(runner, "run", lambda todo, *rest: iter([found[e.name] for e in todo]))
    arguments = ["--results", str(tmp_path / "zoo.jsonl"), "--out", str(tmp_path)]
    assert zoo.main(arguments) == code
    assert ("no longer exact: a" in capsys.readouterr().out) == bool(code)
    assert zoo.main([*arguments, "--accept"]) == int(status == "crashed")  # a crash is never accepted
    kept = "exact" if status == "skipped" else status
    assert zoo.read_baseline() == {"a": kept, "b": "refused", "gone": "exact"}


# -- beside torch-pruning --------------------------------------------------------------------------------------


class Permuted(nn.Module):
    """torch-pruning takes the permuted pixels of a flattened picture for its channels."""

    def __init__(self, permute):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 4, 2)
        self.permute = permute

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.last((x.permute(0, 2, 3, 1) if self.permute else x).flatten(1))


def last_pair(build):
    *_, pair = peers.compare(entry("pair", build))
    return pair


@pytest.mark.parametrize("permute", [False, True])
def test_either_library_is_held_to_what_its_network_should_compute(permute):
    pytest.importorskip("torch_pruning")
    pair = last_pair(lambda: (Permuted(permute), torch.randn(2, 3, 4, 4)))
    ours, theirs = pair["ours"], pair["theirs"]
    assert (ours["problem"], theirs["problem"]) == ("", "")
    assert ours["macs"] == theirs["macs"] == 0.5
    assert ours["error"] < 1e-6 and (theirs["error"] > 1e-2) == permute
    assert ours["graph_s"] > 0 and 0 < theirs["graph_s"] <= theirs["ready_s"] * 5


def test_torch_pruning_is_cut_off_and_our_side_stays(monkeypatch):
    tp = pytest.importorskip("torch_pruning")

    def hang(*args, **kwargs):
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(peers, "TIME_LIMIT", 0.5)
    monkeypatch.setattr(tp.pruner, "BasePruner", hang)
    pair = last_pair(entry("plain").build)
    assert pair["status"] == "compared" and not pair["ours"]["problem"] and pair["ours"]["macs"] == 0.6
    assert "took more than" in pair["theirs"]["problem"] and pair["theirs"]["stage"] == "groups"
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)

    monkeypatch.setattr(tp.pruner, "BasePruner", lambda *args, **kwargs: torch.empty(peers.MEMORY_LIMIT))
    assert "memory" in last_pair(entry("plain").build)["theirs"]["problem"]


def test_the_side_by_side_counts_what_each_can_do(tmp_path, monkeypatch, capsys):
    side = peers.Side("", "forward", 0.1, 0.2, 0.3, 0.25, 1e-7, 4)
    slower = dataclasses.replace(side, graph_s=0.2, heads=8)
    wrong = dataclasses.replace(side, error=0.5)
    stopped = dataclasses.replace(side, problem="IndexError: oh", stage="groups", error=None)
    pairs = {
        n: dataclasses.asdict(peers.Pair(n, "timm", heads=h, ours=side, theirs=theirs))
        for n, h, theirs in [("timm:a", 8, slower), ("timm:b", 0, wrong), ("timm:c", 8, stopped)]
    }
    monkeypatch.setattr(zoo, "entries", lambda: [entry(n) for n in ("hf:x", *pairs)])
    monkeypatch.setattr(zoo, "read_baseline", dict)
    monkeypatch.setattr(peers, "is_installed", lambda: True)
    monkeypatch.setattr(peers, "version", lambda: "1.2.3")
    monkeypatch.setattr(peers, "warm_up", lambda: None)
    asked = []

    def given(todo, measuring, *rest):
        asked.append([e.name for e in todo])
        return iter([pairs[e.name] if measuring is peers.compare else row(e.name) for e in todo])

    monkeypatch.setattr(runner, "run", given)
    options = ["--results", str(tmp_path / "zoo.jsonl"), "--out", str(tmp_path), "--peers"]
    assert zoo.main(options) == 0 and zoo.main(options) == 0
    assert asked == [["hf:x", *pairs], [*pairs], [], []]  # what was compared is not compared again
    page = (tmp_path / "zoo.md").read_text()
    for line in (
        "## Beside torch-pruning 1.2.3", "| a smaller network that runs | 3 of 3 | 2 of 3 |",
        "| and computes what it should, to 1e-4 | 3 of 3 | 1 of 3 |",
        "| fewer heads, of the models with heads | 2 of 2 | 0 of 2 |",
        "below torch-pruning's graph on 1 of 2 models that both can do. Where torch-pruning stopped: groups 1.",
        "| timm:c | 25.0% | - | 1e-07 |  | 8 > 4 |  |", "theirs, groups: IndexError: oh |", "| **5e-01** |",
    ):  # fmt: skip
        assert line in page
    monkeypatch.setattr(peers, "is_installed", lambda: False)
    assert zoo.main([*options, "--fresh"]) == 0
    assert "torch-pruning is not installed (pip install -e '.[zoo]')" in capsys.readouterr().err
    assert "Beside" not in (tmp_path / "zoo.md").read_text()


def test_pages_show_every_row():
    rows = [
        row(
            "m1",
            dimensions={"width": 3, "heads": 2},
            params=25_600_000,
            free_params=0.5,
            causes={"softmax over it": 0.6},
        ),
        row("m2", "inexact", error=0.1, problem="exported and gated differ by 1e-01"),
        row("m3", "timeout", problem="took more than 60 s"),
        row("m4", unknown={"foo": ["a"]}, frozen_by_unknown={"foo": ["a", "b"]}, free_params=1.0),
    ]
    page = pages.zoo_page(rows, 3)
    assert "**2 of 4 models exact (50.0%).**" in page
    line = next(x for x in page.splitlines() if x.startswith("| m1 "))
    assert "| 25.6M |" in line and "| 3 / 2 / 0 / 0 |" in line and "softmax over it: 60.0%" in line
    assert "**timeout**" in page and "exported and gated differ" in page
    assert (
        len({x.count("|") for x in page.splitlines() if x[:3] in ("| m", "| -") and "--: |" not in x[:40]} - {3}) == 1
    )
    unsupported = pages.unsupported_page(rows)
    assert "| `foo` | m4 | 2: a of m4 ... |" in unsupported


def test_a_row_is_plain_data():
    assert json.loads(json.dumps(row("a"))) == row("a")
    assert {f.name for f in dataclasses.fields(Row)} == set(row("a"))
