"""Pages: every figure agrees with scikit-learn's or scipy's of the same files; a page needs nothing but itself."""

from __future__ import annotations

import html.parser
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import COMMITTED
from matplotlib.colors import to_rgb
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, recall_score
from torch import from_numpy
from torchmetrics.functional.classification import multiclass_calibration_error

from cifar_lab import calibration, plots
from cifar_lab import report as run_report
from cifar_lab.compare import compare, mcnemar
from cifar_lab.evaluate import Evaluation, confident_mistakes, record_of_images, record_of_test
from cifar_lab.files import read_json, write_json
from cifar_lab.recipe import InputError
from tune.importance import FEWEST, importance
from tune.report import by_rung, main, searched, stop_section
from tune.report import write_report as write_search_report

RESULTS = Path(__file__).parent.parent / "results"
CLASSIC, RESNET = (RESULTS / name / "corrected" for name in ("001-classic-cnn", "001-resnet"))
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VEHICLES = np.isin(CLASSES, ("airplane", "automobile", "ship", "truck"))
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """A page as its reader has it: by section its words, tables, facts (dt to dd), list and texts of its figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.section = "top"
        self.words: dict[str, list[str]] = {}
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.facts: dict[str, dict[str, str]] = {}
        self.items: dict[str, list[str]] = {}
        self.drawn: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        elif tag == "table":
            self.tables.setdefault(self.section, []).append([])
        elif tag == "tr":
            self.tables[self.section][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1][-1].append("")
        elif tag == "dt":
            self.name = ""
        elif tag == "li":
            self.items.setdefault(self.section, []).append("")
        elif tag == "text":
            self.drawn.setdefault(self.section, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"{tag} closes what is not open"

    def handle_data(self, data: str) -> None:
        self.words.setdefault(self.section, []).append(data)
        if {"td", "th"} & set(self.open):
            self.tables[self.section][-1][-1][-1] += data
        elif "text" in self.open:
            self.drawn[self.section][-1] += data
        elif "dt" in self.open:
            self.name += data
        elif "dd" in self.open:
            self.facts.setdefault(self.section, {})[self.name] = data
        elif "li" in self.open:
            self.items[self.section][-1] += data

    def text(self, section: str) -> str:
        return " ".join(" ".join(self.words[section]).split())


@pytest.fixture(scope="module")
def classic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    """The page of the committed search of 30 trials, compared with another, and its source."""
    folder = tmp_path_factory.mktemp("pages")
    for name, source in (("classic", CLASSIC), ("resnet", RESNET)):
        shutil.copytree(source, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["classic", "--compare", "resnet"]) == 0
    source = (folder / "classic" / "report.html").read_text()
    return Page(source), source


@pytest.fixture(scope="module")
def page(classic: tuple[Page, str]) -> Page:
    return classic[0]


@pytest.fixture(scope="module")
def said() -> pd.DataFrame:
    return pd.read_csv(CLASSIC / "test_predictions.csv")


def wilson(correct: int, n: int) -> tuple[float, float]:
    interval = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


# The figures


def test_the_headline_is_the_mean_of_the_seeds_with_scipys_interval(page: Page) -> None:
    best = read_json(CLASSIC / "best.json")
    seeds = best["test_acc_seeds"]
    interval = stats.ttest_1samp(seeds, 0).confidence_interval(0.95)
    headline = f"Test accuracy {np.mean(seeds):.2%} ({interval.low:.2%} to {interval.high:.2%}, t 95%, 3 seeds,"
    assert f"{headline} n = 10,000)." in page.text("top")
    assert page.facts["top"]["tested on"] == "10,000 test images, by 3 seeds: 66.40%, 67.15%, 66.28%"
    assert page.facts["top"]["hardware"] == best["hardware"] and page.facts["top"]["command"] == best["command"]
    assert "94%" in page.facts["top"]["people"]
    assert set(page.drawn["top"]) == {f"{np.mean(seeds):.1%}", "people 94%", "chance 10%", "published 64.4%"}


def test_accuracy_macro_f1_mean_and_spread_are_scikit_learns(page: Page, said: pd.DataFrame) -> None:
    accuracy = accuracy_score(said.label, said.prediction)
    low, high = wilson(int((said.label == said.prediction).sum()), len(said))
    recall = recall_score(said.label, said.prediction, average=None)
    assert page.facts["class-by-class"] == {
        "accuracy": f"{accuracy:.2%} ({low:.2%} to {high:.2%})",
        "macro F1": f"{f1_score(said.label, said.prediction, average='macro'):.4f}",
        "mean of the classes": f"{recall.mean():.1%}",
        "spread of the classes": f"{np.std(recall, ddof=0):.1%} (standard deviation, ddof 0)",
        "animals": f"{recall[~VEHICLES].mean():.1%}",
        "vehicles": f"{recall[VEHICLES].mean():.1%}",
        "people": "94%",
    }


def test_each_class_has_its_recall_and_its_wilson_interval(page: Page, said: pd.DataFrame) -> None:
    recall = recall_score(said.label, said.prediction, average=None)
    (rows,) = page.tables["class-by-class"]
    assert rows[0] == ["class", "n", "correct", "accuracy", "95% interval"]
    for row, name, own, i in zip(rows[1:], CLASSES, recall, range(10), strict=True):
        n, correct = int((said.label == i).sum()), int(((said.label == i) & (said.prediction == i)).sum())
        low, high = wilson(correct, n)
        assert row == [name, str(n), str(correct), f"{own:.1%}", f"{low:.1%} to {high:.1%}"]
        assert f"{own:.1%}" in page.drawn["class-by-class"]


def test_the_heatmap_and_the_worst_confusions_are_scikit_learns(page: Page, said: pd.DataFrame) -> None:
    shares = confusion_matrix(said.label, said.prediction, normalize="true")
    cells = [text for text in page.drawn["what-is-taken-for-what"] if re.fullmatch(r"[\d.]+", text)]
    assert cells == [f"{100 * share:.1f}" for share in shares.ravel()]
    counts = confusion_matrix(said.label, said.prediction)
    np.fill_diagonal(counts, 0)
    (rows,) = page.tables["what-is-taken-for-what"]
    assert [int(row[2]) for row in rows[1:]] == sorted(counts.ravel(), reverse=True)[:8]
    for true, taken, n, share in rows[1:]:
        place = CLASSES.index(true), CLASSES.index(taken)
        assert int(n) == counts[place] and share == f"{shares[place]:.1%}"


def test_the_calibration_is_that_of_scikit_learns_curve(page: Page, said: pd.DataFrame) -> None:
    right = (said.label == said.prediction).to_numpy()
    accuracy, confidence = calibration_curve(right, said.probability, n_bins=15)
    edges = np.linspace(0, 1, 16)
    n = np.histogram(-said.probability, -edges[::-1])[0][::-1]  # bins that hold their upper edge
    error = (n[n > 0] * abs(accuracy - confidence)).sum() / n.sum()
    facts = page.facts["calibration"]
    assert facts["ECE"] == f"{error:.2%} (15 bins of equal width)"
    assert (facts["mean confidence"], facts["accuracy"]) == (f"{said.probability.mean():.2%}", f"{right.mean():.2%}")
    assert "temperature" not in facts and "needs the probabilities of all classes" in page.text("calibration")


def test_the_most_confident_mistakes_are_listed_where_their_images_are_absent(page: Page, said: pd.DataFrame) -> None:
    wrong = said[said.label != said.prediction].sort_values("probability", ascending=False, kind="stable").head(16)
    (rows,) = page.tables["the-most-confident-mistakes"]
    assert rows[1:] == [
        [str(i), CLASSES[label], CLASSES[taken], f"{sure:.1%}"] for i, label, taken, sure in wrong.to_numpy(object)
    ]


def test_the_comparison_is_scipys_binomial_and_paired_t(page: Page, said: pd.DataFrame) -> None:
    other = pd.read_csv(RESNET / "test_predictions.csv")
    right = [(t.label == t.prediction).to_numpy() for t in (said, other)]
    counts = pd.crosstab(*right)
    both = stats.ttest_rel(right[0].astype(float), right[1].astype(float))
    low, high = both.confidence_interval(0.95)
    facts = page.facts["against-resnet"]
    assert (facts["this"], facts["other"]) == tuple(f"{r.mean():.2%}" for r in right)
    difference = 100 * (right[0].mean() - right[1].mean())
    assert facts["difference"] == f"{difference:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f})"
    assert facts["only this right"] == f"{counts.loc[True, False]:,} of 10,000 images"
    assert facts["only other right"] == f"{counts.loc[False, True]:,}"
    assert facts["McNemar"].startswith("p < 0.0001")
    (rows,) = page.tables["against-resnet"]
    raw = []
    for i, row in enumerate(rows[1:]):
        own = [r[said.label == i] for r in right]
        split = int((own[0] & ~own[1]).sum()), int((own[1] & ~own[0]).sum())
        raw.append(stats.binomtest(split[0], sum(split)).pvalue)
        assert row[:3] == [CLASSES[i], *(f"{r.mean():.1%}" for r in own)]
        assert float(row[3]) == pytest.approx(100 * (own[0].mean() - own[1].mean()))
        assert [int(cell) for cell in row[4:6]] == list(split)
        assert row[6] == (f"{raw[-1]:.2g}" if raw[-1] >= 0.0001 else "< 0.0001")
    order = np.argsort(raw)[::-1]  # Benjamini and Hochberg by hand: from the largest p down
    adjusted = np.minimum.accumulate(np.array(raw)[order] * 10 / np.arange(10, 0, -1))
    for place, value in zip(order, adjusted, strict=True):
        assert rows[1 + place][7] == (f"{value:.2g}" if value >= 0.0001 else "< 0.0001")


def test_the_rungs_tell_who_was_stopped_where_and_what_that_saved(page: Page) -> None:
    trials = pd.read_csv(CLASSIC / "trials.csv")
    curves = pd.read_csv(CLASSIC / "curves.csv")
    stopped_at = Counter(int(reason.split(":")[0].split()[1]) for reason in trials.reason if reason != "all epochs")
    (rows,) = page.tables["what-stopping-saved"]
    for rung, reached, stopped, kept, cutoffs, best_stopped, worst_kept, saved in rows[1:]:
        there = curves[curves.epoch == int(rung)].val_acc
        assert int(reached) == len(there) == (trials.epochs >= int(rung)).sum() == int(stopped) + int(kept)
        assert int(stopped) == stopped_at[int(rung)] and int(saved) == int(stopped) * (30 - int(rung))
        own = trials[trials.reason.str.startswith(f"rung {rung}:")]
        given = own.reason.str.extract(r"cutoff ([\d.]+)")[0].astype(float)
        ends = dict.fromkeys((f"{given.min():.1%}", f"{given.max():.1%}"))
        assert cutoffs == " to ".join(ends)
        assert best_stopped == f"{there[curves.trial_id.isin(own.trial_id)].max():.1%}"
        assert worst_kept == f"{there[~curves.trial_id.isin(own.trial_id)].min():.1%}"
    assert [int(row[0]) for row in rows[1:]] == sorted(stopped_at)
    assert sum(int(row[-1]) for row in rows[1:]) == 30 * 30 - trials.epochs.sum()
    assert "223 epochs of the 900 that running all would take; stopping saved 677 (75%)" in page.text(
        "what-stopping-saved"
    )


def test_a_rung_that_kept_no_one_and_a_search_that_stopped_no_one_have_their_table() -> None:
    curves = pd.DataFrame({"trial_id": ["a", "b"], "epoch": [1, 1], "val_acc": [0.5, 0.2]})
    trials = pd.DataFrame({"trial_id": ["a", "b"], "status": "stopped", "reason": ["all epochs", None]})
    assert by_rung(trials, curves).empty
    trials["reason"] = [f"rung 1: below the cutoff 0.{c}000 of the 4 before it" for c in (6, 7)]
    (row,) = by_rung(trials, curves).to_dict("records")
    assert (row["reached"], row["stopped"], row["kept"], row["cutoff_low"], row["cutoff_high"]) == (2, 2, 0, 0.6, 0.7)
    assert row["best_stopped"] == 0.5 and np.isnan(row["worst_kept"])


def test_only_what_stopping_saved_counts_as_saved(tmp_path: Path) -> None:
    trials = pd.read_csv(CLASSIC / "trials.csv")
    (curves := pd.read_csv(CLASSIC / "curves.csv")).to_csv(tmp_path / "curves.csv", index=False)
    ended = trials.trial_id == trials.trial_id[(trials.status == "stopped") & (trials.epochs == 1)].iloc[0]
    trials.loc[ended, ["status", "reason"]] = ["diverged", "epoch 1: train_loss nan, val_loss nan"]
    said = str(stop_section(tmp_path, trials, 30))
    assert f"stopping saved {677 - 29}" in said and "1 diverged" in said
    first, kept = by_rung(trials, curves).iloc[0], trials[(trials.epochs > 1)]
    assert first.kept == len(kept), "a trial that diverged there was not kept"


def test_the_finalists_are_scipys_means_and_deviations_of_their_seeds(page: Page) -> None:
    finalists = pd.read_csv(CLASSIC / "finalists.csv")
    of_trial = {str(trial): own.val_acc for trial, own in finalists.groupby("trial_id")}
    ranked = sorted(of_trial, key=lambda trial: -float(stats.tmean(of_trial[trial])))
    (rows,) = page.tables["winner-t022"]
    assert rows == [
        ["finalist", "mean val_acc", "std (ddof 1)", "seeds"],
        *([t, f"{stats.tmean(of_trial[t]):.2%}", f"{stats.tstd(of_trial[t]):.2%}", "3"] for t in ranked),
    ]
    assert ranked[0] == read_json(CLASSIC / "best.json")["trial_id"] and len(ranked) == 3
    accuracy = accuracy_score(*pd.read_csv(CLASSIC / "test_predictions.csv")[["label", "prediction"]].to_numpy().T)
    assert f"{accuracy:.2%}" in page.text("winner-t022"), "one of the seeds is that of the file of predictions"


# The curves of thirty trials


def test_every_one_of_thirty_trials_is_drawn_bold_and_faint_in_one_color_and_listed_with_its_maxima(page: Page) -> None:
    curves = pd.read_csv(CLASSIC / "curves.csv")
    best = curves.groupby("trial_id")[["val_acc", "train_acc"]].max()
    best = best.sort_values("val_acc", ascending=False, kind="stable")
    lowest = curves.groupby("trial_id")[["val_loss", "train_loss"]].min()
    listed = page.items["every-trial-over-epochs"]
    assert len(listed) == 60
    for item, (trial, row) in zip(listed[:30], best.iterrows(), strict=True):
        assert item == f"{trial} {row.val_acc:.1%} {row.train_acc:.1%}"
    losses = {item.split()[0]: item.split()[1:] for item in listed[30:]}
    assert losses == {str(t): [f"{row.val_loss:.3f}", f"{row.train_loss:.3f}"] for t, row in lowest.iterrows()}
    for metric in ("acc", "loss"):
        lines = plots.curves(curves, metric).axes[0].lines
        assert len(lines) == 60
        for validation, training in zip(lines[::2], lines[1::2], strict=True):
            assert to_rgb(validation.get_color()) == to_rgb(training.get_color())
            assert validation.get_linewidth() == 2 * training.get_linewidth()
    assert len(set(plots.ranking(curves).color[:7])) == 7


def test_all_trials_are_in_the_table_and_the_winner_on_an_edge_is_warned_of(page: Page) -> None:
    (rows,) = page.tables["all-trials"]
    assert len(rows) == 31 and rows[1][0] == "T022"
    assert "dropout 0.1 sits on the lower edge of its range (0.1 | 0.3 | 0.5)" in page.text("winner-t022")


def test_a_limit_on_the_training_images_shows_beside_the_headline() -> None:
    folder = RESULTS / "beyond-nf-resnet" / "corrected"
    best = read_json(folder / "best.json")
    told = f"{best['recipe']['limit_train']:,}"
    assert f"beyond-nf-resnet, corrected: {told} training images (limit_train)" in run_report.scale(best)
    assert f"Trained on {told} images only (limit_train)" in run_report.scale({"recipe": best["recipe"]})
    assert f"{told} images only (limit_train)" in run_report.context(folder, best)


# Studies and grids

BATCH, WATCHED, FOLDS = (
    RESULTS / name for name in ("002-batch/corrected", "002-test/as_reported", "000-kfold/corrected")
)
STUDIES = [file.parent for file in COMMITTED]


@pytest.fixture(scope="module", params=[BATCH, WATCHED, FOLDS], ids=lambda folder: "/".join(folder.parts[-2:]))
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """The folder of a committed study, and the page that is written of it."""
    folder = tmp_path_factory.mktemp("study") / "made"
    shutil.copytree(request.param, folder, ignore=shutil.ignore_patterns("figures", "report.html"))
    assert main([str(folder)]) == 0
    return request.param, Page((folder / "report.html").read_text())


def published(folder: Path) -> pd.DataFrame:
    rows = pd.read_csv(RESULTS / "published.csv")
    return rows[(rows.study == folder.parent.name) & (rows.variant == folder.name)]


def against(folder: Path) -> list[list[str]]:
    """The cells that published.csv has the section "Published against ours" of a study show, all its remarks there."""

    def cell(value: float) -> str:
        return "" if pd.isna(value) else f"{value:.4f}"

    return [
        [
            row.metric, cell(row.published), cell(row.ours),
            "" if pd.isna(row.low) else f"{row.low:.4f} to {row.high:.4f}", "" if pd.isna(row.reason) else row.reason,
        ]
        for row in published(folder).itertuples()
    ]  # fmt: skip


def completed(page: Page, place: str) -> list[list[str]]:
    """The table of that section, with the remarks that it tells once for all rows put back into each, in order."""
    (rows,) = page.tables[place]
    found = re.search(r"All: (.*)\.$", page.text(place), re.DOTALL)
    if found is None:
        return rows
    for row in rows[1:]:
        assert not set(row[-1].split("; ")) & set(found[1].split("; ")), "told twice"
    return [rows[0], *([*row[:-1], "; ".join(filter(None, [row[-1], found[1]]))] for row in rows[1:])]


def test_a_studys_page_says_how_far_it_was_scaled_down_and_sets_it_against_what_was_published(
    study: tuple[Path, Page],
) -> None:
    folder, page = study
    rows = completed(page, "published-against-ours")
    assert rows == [["metric", "published", "ours", "95% interval", "remarks"], *against(folder)] and len(rows) > 2
    scale = set(published(folder).scale)
    assert len(scale) == 1 and f"{folder.parent.name}, {folder.name}: {scale.pop()}." in page.text("top")
    if folder == BATCH:
        assert "002-batch, corrected: 45,000 training images; 2 of 10 epochs." in page.text("top")


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: "/".join(folder.parts[-2:]))
def test_what_best_json_keeps_of_a_study_is_what_published_csv_has(folder: Path) -> None:
    best = read_json(folder / "best.json")
    (made,) = run_report.study_section(best)
    assert completed(Page(f"<section id='it'>{made.body}</section>"), "it")[1:] == against(folder)
    scale = set(published(folder).scale.dropna())
    assert {run_report.scale(best)} == {f" {folder.parent.name}, {folder.name}: {told}." for told in scale}
    width, limit = best["recipe"].get("width"), best["recipe"]["limit_train"]
    for told in scale:
        assert (f"{best['recipe']['max_epochs']} of " in told) == (" of " in told.partition(" epochs")[0])
        assert (f"width {width} instead of" in told) == ("width " in told) and ("limit_train" in told) == bool(limit)


def test_a_grids_table_is_that_of_its_curves_means_over_folds_by_scipy(study: tuple[Path, Page]) -> None:
    folder, page = study
    curves, trials = pd.read_csv(folder / "curves.csv"), pd.read_csv(folder / "trials.csv")
    kept = pd.read_csv(folder / "settings.csv", index_col="setting_id")
    (rows,) = page.tables["settings"]
    header = rows[0]
    own = header[1 : header.index("val_acc")]
    assert own == list(kept)[: list(kept).index("folds")]
    assert sorted(row[0] for row in rows[1:]) == sorted(kept.index)
    shown = []
    for row in rows[1:]:
        cells = dict(zip(header, row, strict=True))
        mine = curves[curves.trial_id.str.partition("-")[0] == row[0]]
        by_epoch = mine.groupby("epoch").mean(numeric_only=True)
        at = int(by_epoch.val_acc.idxmax())
        there = mine[mine.epoch == at]
        assert (int(cells["best epoch"]), int(cells["folds"])) == (at, len(there))
        shown.append(stats.tmean(there.val_acc))
        several = len(there) > 1
        assert cells["val_acc"] == f"{shown[-1]:.2%}" and cells["train_acc"] == f"{stats.tmean(there.train_acc):.2%}"
        assert cells["std (ddof 1)"] == (f"{stats.tstd(there.val_acc):.2%}" if several else "")
        for name in ("val_loss", "val_macro_f1"):
            assert cells[name] == f"{stats.tmean(there[name]):.4f}"
        assert int(cells["seconds"]) == round(mine.seconds.sum())
        trained = trials[trials.trial_id.isin(mine.trial_id)]
        for name in own:
            assert {str(value) for value in trained[name]} == {cells[name]}
        if several:
            interval = stats.ttest_1samp(there.val_acc, 0).confidence_interval(0.95)
            assert tuple(kept.loc[row[0], ["low", "high"]]) == pytest.approx((interval.low, interval.high))
        assert (cells["status"], cells["reason"]) == (kept.status[row[0]], kept.reason[row[0]])
    # By val_acc alone: a setting given up after fewer folds may stand above the winner.
    assert shown == sorted(shown, reverse=True)


def test_a_grids_headline_is_its_best_setting_with_an_interval_over_folds_or_images(study: tuple[Path, Page]) -> None:
    folder, page = study
    kept = pd.read_csv(folder / "settings.csv")
    best = kept[kept.status == "completed"].sort_values("val_acc").iloc[-1]
    low, high = (best.low, best.high) if best.folds > 1 else wilson(round(best.val_acc * 5000), 5000)
    told = f"Validation accuracy {best.val_acc:.2%} ({low:.1%} to {high:.1%}) at epoch {best.best_epoch}."
    if folder == WATCHED:
        said = pd.read_csv(folder / "test_predictions.csv")
        right = int((said.label == said.prediction).sum())
        low, high = wilson(right, 10_000)
        told += f" Test accuracy {right / 10_000:.2%} ({low:.2%} to {high:.2%}, Wilson 95%, n = 10,000, one seed)."
    assert told in page.text("top")


def test_the_test_curve_is_that_of_its_file_and_ends_where_the_predictions_do(study: tuple[Path, Page]) -> None:
    folder, page = study
    title = "on-the-test-set-after-every-epoch"
    assert (title in page.words) == (folder == WATCHED)
    if folder != WATCHED:
        return
    tested, said = pd.read_csv(folder / "test.csv"), pd.read_csv(folder / "test_predictions.csv")
    assert "nothing was chosen by it" in page.text(title) and {"test accuracy", "G00"} <= set(page.drawn[title])
    for metric in ("acc", "loss"):
        (line,) = plots.tested(tested, metric).axes[0].lines
        assert list(line.get_xdata()) == list(range(1, len(tested) + 1)) == list(tested.epoch)
        assert list(line.get_ydata()) == list(tested[f"test_{metric}"])
    last = tested.iloc[-1]
    assert last.epoch == read_json(folder / "best.json")["epoch"]
    assert last.test_acc == pytest.approx(accuracy_score(said.label, said.prediction))
    assert last.test_macro_f1 == pytest.approx(f1_score(said.label, said.prediction, average="macro"))
    for row in tested.itertuples():
        assert (row.low, row.high) == pytest.approx(wilson(round(row.test_acc * row.n), row.n))


# The page


def test_the_page_needs_nothing_but_itself_and_says_its_figures_in_words(classic: tuple[Page, str]) -> None:
    page, source = classic
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert "@import" not in source and not re.findall(r"url\((?!#)", source) and "http" not in source
    for tag, attributes in page.elements:
        for name in ("href", "src", "xlink:href"):
            assert re.match("#|data:", attributes.get(name, "#")), attributes
        if tag in ("svg", "img"):
            assert attributes.get("aria-label") or attributes.get("alt"), attributes
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == [f"#{attributes['id']}" for tag, attributes in page.elements if tag == "section"]
    assert set(re.findall(r"url\(#(\w+)\)", source)) <= set(ids)
    assert len(source) < 600_000


def test_the_black_of_a_figure_is_the_color_of_the_page(classic: tuple[Page, str]) -> None:
    assert plots.BLACK not in classic[1] and plots.BLUE.lower() not in classic[1]
    assert "prefers-color-scheme: dark" in classic[1] and "@media print" in classic[1]


def test_a_text_on_the_page_is_never_markup(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(CLASSIC, folder)
    best = read_json(folder / "best.json")
    write_json(folder / "best.json", best | {"command": "<script>&", "hardware": "<b>"})
    context = run_report.context(folder, read_json(folder / "best.json"))
    assert "&lt;script&gt;&amp;" in context and "<b>" not in context


def test_an_unfinished_search_has_a_page_without_a_winner(tmp_path: Path) -> None:
    for name in ("trials.csv", "curves.csv"):
        shutil.copy(RESNET / name, tmp_path)
    write_search_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    trials = pd.read_csv(RESNET / "trials.csv")
    assert "has not come to its end" in page.text("top") and len(page.tables["all-trials"][0]) == 1 + len(trials)


# An evaluation, with all probabilities and the images at hand


@pytest.fixture(scope="module")
def answers() -> Evaluation:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 3))
    probabilities = np.exp(2 * logits) / np.exp(2 * logits).sum(1, keepdims=True)  # twice as sure as it should be
    truth = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(3, p=p) for p in truth])
    images = from_numpy(rng.integers(0, 256, (400, 3, 32, 32), dtype=np.uint8))
    return Evaluation(labels, probabilities.astype(np.float32), ("ant", "<bee>", "cow"), images)


@pytest.fixture(scope="module")
def evaluated(answers: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    answers.write(folder)
    write_json(folder / "best.json", record_of_test(answers, [answers.accuracy]))
    run_report.write_report(folder)
    return folder


def test_an_evaluation_shows_the_images_of_its_most_confident_mistakes_and_keeps_them(
    answers: Evaluation, evaluated: Path
) -> None:
    section = "the-most-confident-mistakes"
    before = (evaluated / "report.html").read_text()
    assert main([str(evaluated)]) == 0
    assert (evaluated / "report.html").read_text() == before
    page = Page(before)
    own = before.partition(f'id="{section}"')[2].partition("</section>")[0]
    assert own.count('<image xlink:href="data:image/png;base64,') == 16
    wrong = confident_mistakes(answers.labels, answers.predictions, answers.probabilities.max(1))
    sure = answers.probabilities.max(1)
    assert all(answers.labels[wrong] != answers.predictions[wrong]) and list(sure[wrong]) == sorted(sure[wrong])[::-1]
    mistaken = answers.labels != answers.predictions
    assert sure[wrong].min() >= np.delete(sure, wrong)[np.delete(mistaken, wrong)].max()
    drawn = " ".join(page.drawn[section])
    for i in wrong:
        for part in (answers.classes[answers.labels[i]], f"as {answers.classes[answers.predictions[i]]}"):
            assert part in drawn
        assert f"{sure[i]:.1%}" in drawn


def test_the_error_and_the_log_loss_of_an_evaluation_are_those_of_other_libraries(
    answers: Evaluation, evaluated: Path
) -> None:
    facts = Page((evaluated / "report.html").read_text()).facts["calibration"]
    labels, probabilities = from_numpy(answers.labels), from_numpy(answers.probabilities)
    error = float(multiclass_calibration_error(probabilities, labels, num_classes=3, n_bins=15))
    assert facts["ECE"].startswith(f"{error:.2%} ")
    exact = answers.probabilities.astype(float)
    before = log_loss(answers.labels, exact / exact.sum(1, keepdims=True))
    assert facts["log loss"].startswith(f"{before:.4f}, with it ")
    found = calibration.cross_fit(answers.probabilities, answers.labels)
    assert facts["log loss"].endswith(f"{found.log_loss:.4f}") and found.log_loss < before
    assert facts["ECE with it"] == f"{found.expected_error:.2%}" and found.expected_error < error
    assert facts["temperature"] == "{:.3f} and {:.3f}".format(*sorted(found.temperatures))


def test_a_bin_holds_its_upper_edge_and_its_own_images() -> None:
    edges = np.linspace(0, 1, calibration.BINS + 1)
    rows = calibration.reliability(np.array([edges[3], edges[3] + 1e-9, 1.0]), np.array([True, False, True]))
    assert [(row["from"], row["to"], row["n"], row["accuracy"]) for row in rows] == [
        (edges[2], edges[3], 1, 1), (edges[3], edges[4], 1, 0), (edges[14], 1, 1, 1),
    ]  # fmt: skip
    assert [(row["low"], row["high"]) for row in rows] == [wilson(1, 1), wilson(0, 1), wilson(1, 1)]


def test_a_network_twice_as_sure_as_it_should_be_has_the_temperature_two() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(20_000, 4))
    truth = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (truth.cumsum(1) > rng.random((20_000, 1))).argmax(1)
    sharp = truth**2 / (truth**2).sum(1, keepdims=True)
    assert calibration.fit_temperature(sharp, labels) == pytest.approx(2, rel=0.05)
    np.testing.assert_allclose(calibration.tempered(sharp, 2), truth)


def test_no_image_is_judged_by_a_temperature_that_was_fitted_on_it(answers: Evaluation) -> None:
    found = calibration.cross_fit(answers.probabilities, answers.labels)
    others = answers.labels.copy()
    others[1::2] = (others[1::2] + 1) % 3
    changed = calibration.cross_fit(answers.probabilities, others)
    assert changed.temperatures[0] == found.temperatures[0] and changed.temperatures[1] != found.temperatures[1]
    odd = calibration.tempered(answers.probabilities, found.temperatures[0])[1::2]
    even = calibration.tempered(answers.probabilities, found.temperatures[1])[::2]
    judged = log_loss([*answers.labels[::2], *answers.labels[1::2]], np.concatenate([even, odd]))
    assert found.log_loss == pytest.approx(judged)


def test_a_flawless_evaluation_has_no_mistakes_to_show(tmp_path: Path) -> None:
    labels = np.array([0, 1, 0, 1])
    flawless = Evaluation(labels, np.eye(2, dtype=np.float32)[labels], ("a", "b"))
    flawless.write(tmp_path)
    write_json(tmp_path / "best.json", record_of_test(flawless, [1.0]))
    run_report.write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.text("the-most-confident-mistakes").endswith("None: every prediction is right.")
    assert page.facts["calibration"]["ECE"].startswith("0.00%")


@pytest.mark.parametrize("n", [1, 8])
def test_images_of_ones_own_have_the_sections_of_a_test_set_but_not_its_name(
    n: int, answers: Evaluation, tmp_path: Path
) -> None:
    said = answers.probabilities[:n]
    taken = said.argmax(1)
    labels = np.where(taken == 2, 0, taken)  # the third class has no images, though some are taken for it
    files = tuple(f"/own/{i}.png" for i in range(n))
    assert answers.images is not None
    own = Evaluation(labels, said, answers.classes, answers.images[:n], files=files)
    own.write(tmp_path)
    rows = [(name, s, 0.5 - 0.1 * s) for name in ("fog", "snow") for s in (1, 5)]
    pd.DataFrame(rows, columns=["corruption", "severity", "accuracy"]).to_csv(tmp_path / "corruptions.csv", index=False)
    record = record_of_images(own, Path("/own")) | {"corruptions_acc": 0.2}
    write_json(tmp_path / "best.json", record)
    run_report.write_report(tmp_path)
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    accuracy, (low, high) = (labels == taken).mean(), wilson(int((labels == taken).sum()), n)
    assert page.facts["class-by-class"]["accuracy"] == f"{accuracy:.2%} ({low:.2%} to {high:.2%})"
    f1 = [f1_score(labels == i, taken == i) for i in set(labels)]
    assert page.facts["class-by-class"]["macro F1"] == f"{np.mean(f1):.4f}", "of the classes that have images"
    assert page.facts["top"]["tested on"] == f"{n} image{'s' * (n > 1)} in /own, by 1 seed: {accuracy:.2%}"
    assert page.tables["class-by-class"][0][3] == ["cow", "0", "0", "", ""]
    assert ("temperature" in page.facts["calibration"]) == (n > 1)
    assert page.drawn["the-most-confident-mistakes"].count("as cow") == (taken == 2).sum() > 0
    assert {"fog", "snow", "mean", "40.0", "0.0", "20.0"} <= set(page.drawn["corrupted-images"])
    assert "nan" not in source and "test images" not in source and "Test accuracy" not in source
    (tmp_path / "figures" / "mistakes.svg").unlink()
    run_report.write_report(tmp_path)
    (listed,) = Page((tmp_path / "report.html").read_text()).tables["the-most-confident-mistakes"]
    assert listed[0][0] == "file" and {row[0] for row in listed[1:]} == {files[i] for i in np.flatnonzero(taken == 2)}


# What a comparison refuses


def test_equal_answers_do_not_differ() -> None:
    right = np.array([True, False, True])
    same = mcnemar(right, right)
    assert (same.difference, same.only_first, same.only_second, same.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "test_predictions.csv").unlink(), r"holds no test_predictions\.csv"),
        (lambda folder: shutil.rmtree(folder), r"holds no test_predictions\.csv"),
        (lambda folder: edit(folder, "per_class.csv", "airplane", "plane"), "knows the classes plane, automobile"),
        (lambda folder: edit(folder, "test_predictions.csv", "\n5,0,", "\n5,1,"), "10,000 images, .* labels differ"),
        (lambda folder: edit(folder, "test_predictions.csv", r"\n9999,.*", ""), "tested on 9,999 images"),
    ],
)
def test_another_test_set_is_refused_before_anything_is_written(change, words: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name in ("one", "other"):
        shutil.copytree(CLASSIC, tmp_path / name, ignore=shutil.ignore_patterns("report.html"))
    change(tmp_path / "other")
    with pytest.raises(InputError, match=f"compare: .*{words}"):
        main([str(tmp_path / "one"), "--compare", str(tmp_path / "other")])
    assert not (tmp_path / "one" / "report.html").exists()


def edit(folder: Path, name: str, before: str, after: str) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(re.sub(before, after, text, count=1))
    assert (folder / name).read_text() != text


def test_a_class_with_too_few_images_is_left_out_of_a_comparison(tmp_path: Path) -> None:
    labels = np.array([0, 0, 1, 1, 2])
    Evaluation(labels, np.eye(3)[labels], ("a", "b", "c")).write(tmp_path)
    whole, by_class = compare(tmp_path, tmp_path)
    assert whole.n == 5 and set(by_class) == {"a", "b"}


# Importance


def test_the_forest_finds_the_field_that_matters_and_knows_when_it_has_learned_nothing() -> None:
    rng = np.random.default_rng(0)
    trials = pd.DataFrame(
        {"lr": rng.random(30), "dropout": rng.random(30), "init": rng.choice(["xavier", "default"], 30)}
    )
    trials["val_acc"] = 0.5 + 0.3 * (trials.init == "xavier") + 0.01 * rng.random(30)
    found = importance(trials, ["lr", "dropout", "init"])
    assert found is not None and found.n == 30 and found.table.field[0] == "init"
    assert found.table["mean"][0] > 10 * found.table["mean"][1] and found.error < found.guess / 5
    noise = importance(pd.DataFrame({"lr": rng.random(100), "val_acc": rng.random(100)}), ["lr"])
    assert noise is not None and noise.error > noise.guess


def test_importance_is_not_asked_of_a_few_trials() -> None:
    trials = pd.read_csv(CLASSIC / "trials.csv")
    assert importance(trials.head(FEWEST - 1), searched(trials)) is None
    trials.loc[FEWEST:, "val_acc"] = np.nan
    found = importance(trials, ["lr"])
    assert found is not None and found.n == FEWEST


def test_the_page_says_how_rough_the_importance_is(page: Page) -> None:
    text = page.text("settings-against-val-acc")
    assert "n = 30 trials: a rough hint" in text and "25 were stopped" in text
    assert page.drawn["settings-against-val-acc"].count("lr") == 2, "a slice and a bar"
