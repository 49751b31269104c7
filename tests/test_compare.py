"""A comparison is fair, repeats, resumes, and says only what the noise allows."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest
import torch
import torch.nn.functional as F
from nets import assert_same, fingerprint
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from typer.testing import CliRunner

import dmscale
from dmscale import DmscaleError
from dmscale.cli import app
from dmscale.compare import Stream
from dmscale.comparison import Comparison, Row, indistinguishable, judge
from dmscale.demo import ResidualCNN
from dmscale.evaluate import accuracy
from dmscale.strategies import REGISTRY, Found, Strategy

CPU = torch.device("cpu")


def data(n=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    return TensorDataset(x, (x.mean((1, 2, 3)) * 40).long().clamp(0, 9))


def run(out, **options):
    torch.manual_seed(0)
    model = options.pop("model", None) or ResidualCNN((6, 8), 2)
    arguments = {
        "strategies": "dmscale,knapsack",
        "seeds": 2,
        "search_steps": 4,
        "recovery_steps": 3,
        "lr": 1e-3,
    } | options
    return dmscale.compare(
        model, torch.zeros(1, 1, 8, 8), arguments.pop("train", lambda seed: DataLoader(data(), 16, shuffle=True)),
        F.cross_entropy, lambda net: 100 * accuracy(net, DataLoader(data(), 32)), budget="50% macs", out=out,
        progress=False, **arguments,
    )  # fmt: skip


def test_two_runs_with_one_seed_give_the_same_table_and_the_model_is_left_alone(tmp_path):
    torch.manual_seed(0)
    model = ResidualCNN((6, 8), 2)
    before = fingerprint(model)
    first = run(tmp_path / "a", model=model)
    assert_same(before, fingerprint(model))
    torch.manual_seed(123)  # what the caller's generator holds does not matter
    second = run(tmp_path / "b", model=model)
    assert first.markdown(timing=False) == second.markdown(timing=False)
    assert {r.strategy for r in first.rows} == {"dmscale", "knapsack", "uniform", "random"}
    place = tmp_path / "a" / "dmscale" / "seed-1"
    expected = {"config.json", "structure.json", "curves.csv", "weights.safetensors", "result.json", "history.json"}
    assert {p.name for p in place.iterdir()} == expected
    structure = dmscale.Structure.from_json((place / "structure.json").read_text())
    small = dmscale.load(place / "weights.safetensors", lambda: ResidualCNN((6, 8), 2))
    result = json.loads((place / "result.json").read_text())
    assert 100 * accuracy(small, DataLoader(data(), 32)) == pytest.approx(result["value"])
    assert result["macs"] == dmscale.trace(model, torch.zeros(1, 1, 8, 8)).cost(structure).macs
    assert {"torch", "dmscale", "seed", "device", "date", "lr"} <= json.loads(
        (place / "config.json").read_text()
    ).keys()
    assert (tmp_path / "a" / "comparison.png").stat().st_size > 1000


def test_all_take_the_same_steps_over_the_same_batches(tmp_path):
    seen = {}

    class Spy:
        """Batches that are counted; the epoch is longer than a run."""

        def __init__(self, seed):
            self.batches = seen.setdefault(seed, [])

        def __iter__(self):
            self.batches.append([])
            for _ in range(50):
                index = torch.randint(0, 64, (16,))
                self.batches[-1].append(index.tolist())
                x, y = data().tensors
                torch.rand(3)  # augmentation
                yield x[index], y[index]

    result = run(tmp_path, train=Spy, seeds=[5], strategies="dmscale")
    streams = [s for s in seen[5] if len(s) == 7]  # 4 of search and 3 of recovery
    assert len(streams) == len(result.rows) == 3
    assert all(s == streams[0] for s in streams)
    steps = {
        r.strategy: json.loads((tmp_path / r.strategy / "seed-5" / "result.json").read_text()) for r in result.rows
    }
    assert {n: (s["search_steps"], s["recovery_steps"]) for n, s in steps.items()} == {
        "dmscale": (4, 3), "uniform": (0, 7), "random": (0, 7),
    }  # fmt: skip


def test_finished_runs_are_not_repeated_and_unfinished_ones_are(tmp_path, monkeypatch):
    first = run(tmp_path, strategies="uniform", seeds=1)
    calls = []
    for name in ("uniform", "random"):
        kept = REGISTRY[name]
        monkeypatch.setitem(
            REGISTRY,
            name,
            Strategy(name, kept.about, lambda task, kept=kept: calls.append(kept.name) or kept.find(task)),
        )
    assert run(tmp_path, strategies="uniform", seeds=1).markdown() == first.markdown()
    assert calls == []
    (tmp_path / "random" / "seed-0" / "result.json").unlink()  # as after a kill
    again = run(tmp_path, strategies="uniform", seeds=1)
    assert calls == ["random"] and again.markdown(timing=False) == first.markdown(timing=False)
    run(tmp_path, strategies="uniform", seeds=1, redo=["uniform"])
    assert calls == ["random", "uniform"]


def test_other_settings_need_another_folder(tmp_path):
    run(tmp_path, strategies="uniform", seeds=1)
    with pytest.raises(DmscaleError, match="recovery_steps: 3 there, 2 now"):
        run(tmp_path, strategies="uniform", seeds=1, recovery_steps=2)


def losses(out, strategy):
    """The first losses of the recovery of one run, before any step has told two runs apart."""
    rows = [r.split(",") for r in (out / strategy / "seed-0" / "curves.csv").read_text().splitlines()[1:]]
    return [float(loss) for _, phase, loss in rows if phase == "recovery"][:1]


def test_every_recovery_is_taught_by_the_dense_network(tmp_path):
    options = dict(seeds=1, strategies="knapsack,uniform")
    run(tmp_path / "plain", **options)
    first = run(tmp_path / "taught", distill="logits, features", **options)
    second = run(tmp_path / "again", distill="logits, features", **options)
    assert first.markdown(timing=False) == second.markdown(timing=False)
    for strategy in ("knapsack", "uniform", "random"):  # the same batch and weights: the rest is what the teacher says
        assert losses(tmp_path / "taught", strategy) > losses(tmp_path / "plain", strategy)
    with pytest.raises(DmscaleError, match="distill: None there"):
        run(tmp_path / "plain", distill="logits", **options)


def test_an_external_model_is_taught_without_features(tmp_path):
    def halved(task):
        return Found(model=task.space.export(task.space.uniform_at("50% macs")))

    other = Strategy("other", "stands for another library", halved, external=True)
    options = dict(seeds=1, strategies="other", extra=[other])
    assert run(tmp_path / "a", distill="logits, features", **options).row("other").values
    assert "add logits" in run(tmp_path / "b", distill="features", **options).row("other").problem


def test_a_strategy_that_fails_does_not_stop_the_others(tmp_path):
    def fail(task):
        for p in task.space.model.parameters():
            p.data.zero_()
        raise RuntimeError("no luck")

    def dense(task):
        return Found(model=ResidualCNN((6, 8), 2))

    extra = [Strategy("broken", "", fail), Strategy("too-large", "", dense, external=True)]
    lines = []
    result = run(tmp_path, strategies=["broken", "too-large"], seeds=1, extra=extra, report=lines.append)
    assert result.row("broken").problem == "RuntimeError: no luck" and "over" in result.row("too-large").problem
    assert not result.row("broken").values and result.row("uniform").values and result.row("random").values
    assert "no luck" in result.markdown() and any("FAILED" in line for line in lines)
    shown = str(result).splitlines()  # the reason stands below the table, whose columns keep their room
    assert any(line.startswith("broken: no result, RuntimeError: no luck") for line in shown)
    assert not any("no luck" in line and "│" in line for line in shown)
    clean = run(tmp_path / "clean", strategies="uniform", seeds=1)
    assert result.row("uniform").values == clean.row("uniform").values  # the weights that it spoilt were put back


def test_an_external_model_is_recovered_and_evaluated_like_any(tmp_path):
    def outside(task):
        return Found(model=task.space.export(task.space.uniform_at(task.budget)))

    result = run(tmp_path, strategies=["outside"], seeds=1, extra=[Strategy("outside", "", outside, external=True)])
    a, b = result.row("outside"), result.row("uniform")
    assert (a.values, a.macs, a.params) == (b.values, b.macs, b.params)


@pytest.mark.parametrize(
    "options, message",
    [({"strategies": "nonsense"}, "unknown strategy"), ({"seeds": 0}, "seed"), ({"search_steps": 0}, "search step")],
)
def test_bad_arguments_are_refused_before_any_training(tmp_path, options, message):
    with pytest.raises(DmscaleError, match=message):
        run(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_the_command_compares_and_resumes(tmp_path):
    net = tmp_path / "small_net.py"
    net.write_text(
        "import torch\nfrom dmscale.demo import ResidualCNN\n\n"
        "def make():\n    return ResidualCNN((4, 6), 2), torch.randn(1, 1, 8, 8)\n"
    )
    arguments = [
        "compare",
        f"{net}:make",
        "--data",
        "digits",
        "--budget",
        "60% macs",
        "--out",
        tmp_path / "out",
        "--seeds",
        1,
    ]
    arguments += ["--strategies", "uniform", "--search-steps", 2, "--recovery-steps", 1, "--device", "cpu"]
    first = CliRunner().invoke(app, [str(a) for a in arguments])
    assert first.exit_code == 0, first.output
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {r["strategy"] for r in table["rows"]} == {"uniform", "random"} and "uniform, seed 0" in first.output
    again = CliRunner().invoke(app, [str(a) for a in arguments])
    assert again.exit_code == 0 and "uniform, seed 0" not in again.output
    wrong = CliRunner().invoke(app, [str(a) for a in [*arguments, "--strategies", "unifrom"]])
    assert wrong.exit_code == 2 and "knapsack" in wrong.stderr


# -- data -------------------------------------------------------------------------------------------------------------


def test_a_stream_depends_on_its_seed_alone():
    loader = DataLoader(data(), 16, shuffle=True, generator=torch.Generator())
    sampled = DataLoader(data(), 16, sampler=RandomSampler(data(), generator=torch.Generator()))
    for train in (loader, sampled, lambda seed: DataLoader(data(), 16, shuffle=True)):
        first = [x for x, _ in itertools.islice(Stream(train, 3, CPU), 9)]
        stream, second = Stream(train, 3, CPU), []
        for _ in range(9):
            torch.rand(5)  # what a strategy draws meanwhile
            next(Stream(train, 7922, CPU))  # and measures on
            second.append(next(stream)[0])
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        other = [x for x, _ in itertools.islice(Stream(train, 4, CPU), 9)]
        assert not all(torch.equal(a, b) for a, b in zip(first, other))


def test_a_stream_refuses_what_is_no_training_data():
    with pytest.raises(DmscaleError, match="empty"):
        next(Stream([], 0, CPU))
    with pytest.raises(DmscaleError, match="pairs"):
        next(Stream([torch.zeros(3)], 0, CPU))


# -- what the noise lets one say -----------------------------------------------------------------------------------------


def row(name, *values):
    return Row(name, values, values, 0.5, 0.5, 1.0, 1.0, 0.1)


def test_verdicts():
    rows = judge(
        [row("random", 70, 71, 72), row("a", 80, 81, 82), row("b", 80.5, 81, 81.2), Row("c", problem="x")], True
    )
    assert [r.strategy for r in rows] == ["a", "b", "random", "c"]
    assert [r.verdict for r in rows] == ["best", "tie", "behind", ""]
    assert rows[0].gain == pytest.approx(100 * 10 / 71) and rows[2].gain == 0
    lower = judge([row("random", 7.0, 7.1), row("a", 5.0, 5.1)], False)
    assert lower[0].strategy == "a" and lower[0].gain > 0 and lower[1].verdict == "behind"
    assert {r.verdict for r in judge([row("random", 7.0), row("a", 9.0)], True)} == {""}  # one seed says nothing


def test_indistinguishable_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    decided = set()
    for n in (2, 3, 5, 20):
        for shift in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0):
            a, b = torch.randn(n, generator=generator).tolist(), (torch.randn(n, generator=generator) + shift).tolist()
            test = stats.ttest_ind(a, b, equal_var=False)
            if 0.04 < test.pvalue < 0.06:
                continue  # quantiles are interpolated here
            assert indistinguishable(a, b) == bool(test.pvalue > 0.05), (a, b, test)
            decided.add(indistinguishable(a, b))
    assert decided == {True, False}
    assert indistinguishable([1.0, 1.0], [1.0, 1.0]) and not indistinguishable([1.0, 1.0], [2.0, 2.0])


def test_the_table_says_mean_spread_and_sense():
    rows = judge([row("random", 7.0, 7.2), row("a", 5.0, 5.2)], False)
    table = Comparison(rows, "perplexity", False, 4.0, {"budget": "50% params", "total_steps": 9, "search_steps": 4})
    text = table.markdown()
    assert "5.100 ± 0.141" in text and "4.000" in text and "50% params" in text
    assert table.row("a").spread == pytest.approx(statistics.stdev([5.0, 5.2]))
    assert json.loads(json.dumps(table.to_dict()))["rows"][0]["strategy"] == "a"
    assert "perplexity" in str(table)
