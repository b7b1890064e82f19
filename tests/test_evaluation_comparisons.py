"""Agreement, paired tests and strengths against published examples, other libraries and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import permutation_test

from lora_dae.config import ConfigError
from lora_dae.evaluation.statistics.agreement import krippendorff_alpha
from lora_dae.evaluation.statistics.bootstrap import wilson_interval
from lora_dae.evaluation.statistics.compare import compare_paired, holm, sign_flip_p
from lora_dae.evaluation.statistics.preference import Vote, davidson, judged_win_rates, strengths, win_rates

NAN = math.nan
# Krippendorff 2011, section C: four observers, twelve units, missing values.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_that_of_the_published_example(level: str, alpha: float) -> None:
    assert krippendorff_alpha(PUBLISHED, level) == pytest.approx(alpha, abs=6e-4)  # type: ignore[arg-type]


def test_alpha_of_perfect_random_and_empty_ratings() -> None:
    rng = np.random.default_rng(0)
    column = rng.integers(0, 3, 200).astype(float)
    assert krippendorff_alpha(np.stack([column, column])) == pytest.approx(1)
    assert abs(krippendorff_alpha(rng.integers(0, 3, (5, 2000)).astype(float))) < 0.03
    assert math.isnan(krippendorff_alpha(np.full((3, 4), NAN)))
    assert math.isnan(krippendorff_alpha(np.ones((3, 4))))  # no variation: nothing to agree on
    with pytest.raises(ConfigError, match="raters x units"):
        krippendorff_alpha(np.ones(3))


@pytest.mark.parametrize("n", [8, 40])
def test_sign_flip_test_agrees_with_scipy(n: int) -> None:
    d = np.random.default_rng(n).normal(0.35, 1, n)
    expected = permutation_test((d,), np.mean, permutation_type="samples", n_resamples=10_000, rng=1).pvalue
    assert sign_flip_p(d) == pytest.approx(expected, abs=0.012 if n > 12 else 1e-9)


def test_sign_flip_test_holds_its_level() -> None:
    rng = np.random.default_rng(3)
    rejected = np.mean([sign_flip_p(rng.normal(size=20), draws=400) <= 0.05 for _ in range(400)])
    assert 0.02 < rejected < 0.09


def test_holm_is_the_textbook_example() -> None:
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_comparison_tells_better_worse_and_cannot_tell() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=60)
    up, same = base + 0.5 + rng.normal(0, 0.2, 60), base + rng.normal(0, 0.2, 60)
    up[3] = NAN
    first, second = compare_paired([up, same], [base, base])
    assert (first.verdict, second.verdict) == ("better", "cannot tell")
    assert first.pairs == 59 and first.low < 0.5 < first.high
    assert compare_paired([up], [base], better="lower")[0].verdict == "worse"
    assert compare_paired([np.full(4, NAN)], [np.zeros(4)])[0].verdict == "cannot tell"
    assert "better (difference +0" in first.words()
    with pytest.raises(ConfigError, match="same prompts"):
        compare_paired([up], [base[:5]])


def test_more_comparisons_need_more_evidence() -> None:
    d = np.random.default_rng(5).normal(size=50)
    d = (d - d.mean()) / d.std() + 0.36  # 2.5 standard errors from zero: p about 0.014
    zero = np.zeros(50)
    noise = [np.random.default_rng(i).normal(size=50) for i in range(20)]
    alone = compare_paired([d], [zero])[0]
    among = compare_paired([d, *noise], [zero] * 21)[0]
    assert alone.verdict == "better" and among.verdict == "cannot tell" and among.p == alone.p


def test_without_ties_the_strengths_are_those_of_choix() -> None:
    choix = pytest.importorskip("choix", reason="choix is not installed: pip install 'lora-dae[dev]'")
    wins = np.array([[0, 7, 9, 8], [3, 0, 6, 7], [1, 4, 0, 5], [2, 3, 5, 0]], float)
    pairs = [(i, j) for i in range(4) for j in range(4) for _ in range(int(wins[i, j]))]
    expected = choix.ilsr_pairwise(4, pairs)
    got, tie = davidson(wins, np.zeros((4, 4)))
    assert got == pytest.approx(expected - expected.mean(), abs=2e-3) and tie == 0


def test_two_methods_have_the_closed_form() -> None:
    """30 wins, 10 losses, 20 ties: the fitted probabilities are the shares, so p_a / p_b = 3, nu = 20 / sqrt(300)."""
    value, tie = davidson(np.array([[0, 30], [10, 0.0]]), np.array([[0, 20], [20, 0.0]]))
    assert value[0] - value[1] == pytest.approx(math.log(3), abs=1e-3)
    assert tie == pytest.approx(20 / math.sqrt(300), abs=1e-3)


def _simulated(strength: dict[str, float], raters: int, prompts: int, nu: float = 0.5) -> list[Vote]:
    rng = np.random.default_rng(0)
    names, votes = list(strength), []
    for rater in range(raters):
        for prompt in range(prompts):
            a, b = (str(x) for x in rng.choice(names, 2, replace=False))
            p = np.exp([strength[a], strength[b], 0])
            p[2] = nu * math.sqrt(p[0] * p[1])
            outcome = rng.choice(3, p=p / p.sum())
            votes.append(Vote(rater, prompt, a, b, (a, b, None)[outcome]))
    return votes


def test_strengths_of_simulated_raters_are_recovered() -> None:
    truth = {"good": 0.8, "middle": 0.0, "bad": -0.8}
    found = strengths(_simulated(truth, 20, 60), list(truth), replicates=60)
    assert ((found.low < list(truth.values())) & (list(truth.values()) < found.high)).all()
    assert found.value == pytest.approx(list(truth.values()), abs=0.25) and found.tie == pytest.approx(0.5, abs=0.15)


def test_a_method_that_never_lost_stays_finite_and_an_absent_one_is_told() -> None:
    votes = [Vote(0, i, "a", "b", "a") for i in range(9)]
    assert np.isfinite(strengths(votes, ["a", "b"], replicates=10).value).all()
    with pytest.raises(ConfigError, match="nobody voted on 'c'"):
        strengths(votes, ["a", "b", "c"])
    with pytest.raises(ConfigError, match="no vote"):
        strengths([], ["a"])


def test_win_rates_count_a_tie_as_half() -> None:
    votes = [Vote(0, i, "b", "a", w) for i, w in enumerate(["a", "a", "b", None])]
    (row,) = win_rates(votes, ["a", "b", "c"])
    assert (row.a, row.b, row.wins, row.losses, row.ties, row.share) == ("a", "b", 2, 1, 1, 0.625)
    assert row.low < 0.625 < row.high


def test_a_verdict_on_votes_counts_prompts_and_raters_and_not_clicks() -> None:
    """Forty clicks of one rater on one of two prompts are no forty witnesses."""
    many = [Vote(r, p, "a", "b", "a") for r in range(12) for p in range(12)]
    (row,) = judged_win_rates({"q": many}, ["a", "b"])["q"]
    assert row["verdict"] == "better" and row["p_holm"] == pytest.approx(2 / 2**12)
    (row,) = judged_win_rates({"q": many}, ["b", "a"])["q"]
    assert row["verdict"] == "worse"
    few = [Vote(r, p, "a", "b", "a") for r in range(40) for p in range(2)]
    (row,) = judged_win_rates({"q": few}, ["a", "b"])["q"]
    assert row["verdict"] == "cannot tell" and row["p_holm"] == 0.5
    assert row["low"] == pytest.approx(wilson_interval(2, 2)[0])  # of two prompts, not of eighty clicks: 0.34
    (row,) = judged_win_rates({"q": [*few[:-1], Vote(39, 1, "a", "b", "b")]}, ["a", "b"])["q"]
    assert row["share"] > 0.98 and row["low"] < 0.5 and row["verdict"] == "cannot tell"
    split = [Vote(r, p, "a", "b", ("a", "b")[(r + p) % 2]) for r in range(12) for p in range(12)]
    (row,) = judged_win_rates({"q": split}, ["a", "b"])["q"]
    assert row["verdict"] == "cannot tell"
    both = judged_win_rates({"q": many, "r": split}, ["a", "b"])
    assert both["q"][0]["p_holm"] == pytest.approx(2 * 2 / 2**12)  # two tests


def test_a_verdict_points_where_its_test_does() -> None:
    """A hundred clicks on one prompt outnumber thirty prompts, and do not outweigh them."""
    votes = [Vote("r", "loud", "a", "b", "a")] * 100 + [Vote("r", p, "a", "b", "b") for p in range(30)]
    (row,) = judged_win_rates({"q": votes}, ["a", "b"])["q"]
    assert row["share"] > 0.7 and row["verdict"] == "worse"
    by_rater = [Vote(r, "same", "a", "b", "a") for r in range(9)] * 3  # raters for a, the other prompts for b
    by_prompt = [Vote("s", p, "a", "b", "b") for p in range(20)]
    (row,) = judged_win_rates({"q": by_rater + by_prompt}, ["a", "b"])["q"]
    assert row["verdict"] == "cannot tell"


def test_an_interval_of_a_share_takes_in_that_raters_differ() -> None:
    """Thirty raters, each of one mind on all thirty prompts, nineteen for a: thirty votes, not nine hundred."""
    votes = [Vote(r, p, "a", "b", "ab"[r >= 19]) for r in range(30) for p in range(30)]
    (row,) = win_rates(votes, ["a", "b"])
    low, high = wilson_interval(19, 30)
    assert row.share == pytest.approx(19 / 30)
    assert row.low == pytest.approx(low, abs=0.03) and row.high == pytest.approx(high, abs=0.03)
    turned = [Vote(v.prompt, v.rater, v.a, v.b, v.winner) for v in votes]  # prompts that differ
    assert win_rates(turned, ["a", "b"]) == [row]
    each = [Vote("judge", p, "a", "b", "ab"[p >= 19]) for p in range(30)]  # one vote a prompt: Wilson's own
    (row,) = win_rates(each, ["a", "b"])
    assert (row.low, row.high) == pytest.approx((low, high))


@pytest.mark.parametrize(("raters", "prompts", "lean", "times", "most"), [(8, 12, 0.0, 60, 8), (30, 30, 2.0, 250, 20)])
def test_verdicts_on_votes_hold_their_level(raters: int, prompts: int, lean: float, times: int, most: int) -> None:
    """Raters with opinions of their own on each prompt, none on the whole: at most about 5 % are told apart.

    Also where each rater leans to one side, whatever the prompt: prompts agree on them, raters on prompts.
    """
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(times):
        taste, leans = rng.normal(0, 2, prompts), rng.normal(0, lean, raters)  # votes on one prompt go together
        for_a = rng.normal(size=(raters, prompts)) + taste + leans[:, None] > 0
        votes = [Vote(r, p, "a", "b", "a" if for_a[r, p] else "b") for r in range(raters) for p in range(prompts)]
        told += judged_win_rates({"q": votes}, ["a", "b"])["q"][0]["verdict"] != "cannot tell"
    assert told <= most
