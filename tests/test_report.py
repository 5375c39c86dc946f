"""A report as text, as JSON and as a notebook shows it."""

import base64
import json
import re
import sys

import numpy as np
import pytest

import refattn
from refattn.verify import Report, check, check_answer
from refattn.verify import html as html_of
from refattn.verify.findings.parts import Part
from refattn.verify.report import Line

CASES = [(5, 7, 4, 3), (40, 40, 4, 3)]


def right(q, k, v):
    return refattn.softmax_attention(q, k, v)


def tail_wrong(q, k, v):
    y = right(q, k, v)
    y[..., 32:, :] += 0.5
    return y


def tail_nan(q, k, v):
    y = right(q, k, v)
    y[..., 32:, :] = np.nan
    return y


def ask(kernel, **options):
    return check(kernel, "softmax_attention", **{"cases": CASES} | options)


# Text


def test_the_table_in_columns():
    lines = [
        Line("short", 1e-7, 1e-6, "", 12.3),
        Line("a case of a long name: dq", 1.0, 1e-6, "no"),
    ]
    text = str(Report("kernel", lines))
    assert text.splitlines() == [
        "kernel: not right in 1 of 2 cases",
        "case                          error    budget condition  verdict",
        "short                      1.00e-07  1.00e-06        12  right",
        "a case of a long name: dq  1.00e+00  1.00e-06            no",
    ]


def test_no_column_where_nothing_stands_in_it():
    assert "condition" not in str(check_answer(3, 4)) and "condition" in str(ask(right))


@pytest.mark.parametrize(
    ("number", "shown"), [(None, ""), (np.inf, "inf"), (np.nan, "nan"), (1234.5, "1.2e+03")]
)
def test_any_number_has_its_place(number, shown):
    line = Line("case", number or 0.0, number or 0.0, "", number)
    assert str(line) == f"{'case':<24} {number or 0:>9.2e} {number or 0:>9.2e} {shown:>9}  right"
    assert str(line) in str(Report("kernel", [line, Line("other", 0.0, 0.0, "", 1.0)]))


def test_an_exception_of_several_lines_stays_in_its_row():
    def loud(q, k, v):
        raise RuntimeError("one\n  two\nthree")

    report = ask(loud)
    assert "raised RuntimeError: one two three" in str(report)
    assert len(str(report).splitlines()) == 2 + len(report.lines)
    assert report.lines[0].trouble == "raised RuntimeError: one\n  two\nthree"


# JSON


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan, np.float64(np.nan), None])
def test_json_has_no_number_that_is_none(number):
    line = Line("case", 0.0 if number is None else number, 1, "wrong", number)
    (found,) = json.loads(Report("kernel", [line]).to_json())["lines"]
    assert found["conditioning"] is None and found["budget"] == 1.0 and found["passed"] is False
    assert found["error"] == (0.0 if number is None else None)


def test_json_has_the_verdict_and_no_arrays():
    report = json.loads(ask(tail_wrong).to_json())
    assert sorted(report) == ["diagnosis", "findings", "hint", "lines", "passed", "title"]
    assert report["passed"] is False and "0.5 more than what is wanted" in report["findings"][0]
    assert [line["case"] for line in report["lines"]][:2] == [
        "n 5, m 7, d 4, e 3",
        "n 40, m 40, d 4, e 3",
    ]


def test_reports_can_be_compared():
    assert ask(right) == ask(right) != ask(tail_wrong)


# The worst


def test_the_worst_is_the_largest_error_over_its_budget():
    report = ask(tail_wrong)
    worst = report.worst
    assert worst.name == "y" and worst.seen.trial.q.shape[-2] == 40
    assert worst.over == max(line.error / line.budget for line in report.lines)
    assert Report("kernel").worst is None and ask(right).worst.failed is False
    assert ask(tail_nan).worst.over == np.inf
    assert ask(lambda q, k, v: 1 / 0).worst is None


def test_the_worst_may_be_a_gradient():
    def doubled(dy, q, k, v):
        dq, dk, dv = refattn.softmax_attention_vjp(dy, q, k, v)
        return dq, 2 * dk, dv

    report = ask(right, gradients=doubled)
    assert report.worst.name == "dk"
    assert "row of dk" not in report._repr_html_()  # that is in the picture
    assert ", dk: errors up to" in report._repr_html_()


# A notebook


def picture(page):
    return base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', page)[1])


def test_the_page_of_a_failure():
    page = ask(tail_wrong)._repr_html_()
    assert "✗ tail_wrong: not right in" in page and page.count("<tr>") == 1 + len(ask(right).lines)
    assert "0.5 more than what is wanted" in page and "condition: by how much" in page
    assert picture(page).startswith(b"\x89PNG") and len(page) < 60_000
    alt = re.search(r'alt="([^"]+)"', page)[1]
    assert "y: errors up to" in alt and "times the budget" in alt


def test_the_page_says_right_and_wrong_in_words_and_signs():
    page = ask(tail_wrong, cases=[(5, 7, 4, 3), (40, 40, 4, 3)])._repr_html_()
    rows = re.findall(r"<tr>.*?</tr>", page)[1:]
    for row, line in zip(rows, ask(tail_wrong).lines, strict=True):
        assert ("✗" in row and "<strong>" in row) if line.trouble else "✓ right" in row


def test_the_same_numbers_give_the_same_page():
    assert ask(tail_wrong)._repr_html_() == ask(tail_wrong)._repr_html_()


def test_the_page_does_not_depend_on_settings_of_the_notebook():
    matplotlib = pytest.importorskip("matplotlib")
    first = ask(tail_wrong)._repr_html_()
    with matplotlib.rc_context({"image.cmap": "jet", "figure.dpi": 300, "font.size": 20}):
        assert ask(tail_wrong)._repr_html_() == first


def test_names_are_escaped():
    page = check(tail_wrong, "softmax_attention", cases=CASES, title="<b>&kernel")._repr_html_()
    assert "&lt;b&gt;&amp;kernel" in page and "<b>&kernel" not in page

    def raises(q, k, v):
        raise ValueError("<script>")

    assert "<script>" not in ask(raises)._repr_html_()


def test_no_map_of_what_is_right_or_was_not_seen():
    for report in (ask(right), check_answer(3, 4), ask(lambda q, k, v: 1 / 0), Report("kernel")):
        assert "<img" not in report._repr_html_()
    page = Report("kernel", hint="Start from q @ k.T.")._repr_html_()
    assert page == "<p>kernel: nothing here yet. Start from q @ k.T.</p>"
    assert "✓ right: right" in ask(right)._repr_html_()


def test_without_matplotlib_there_is_the_table_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = ask(tail_wrong)._repr_html_()
    assert "<table>" in page and "<img" not in page


def test_a_tiny_array_is_not_drawn_where_a_larger_one_tells_more():
    cases = [(1, 1, 4, 3), (40, 40, 4, 3)]
    report = ask(lambda q, k, v: right(q, k, v) + np.float32(0.5), cases=cases)
    assert report.worst.y.shape == (1, 3)
    assert html_of.mapped(report).y.size > 40


# The map


def map_of(kernel, **options):
    """error / budget of the worst head of the case of 40 tokens, and its title."""
    report = ask(kernel, **options)
    part = next(Part("y", x) for x in report.seen if x.trial.q.shape[-2:] == (40, 4))
    return html_of.worst_head(part)


def test_the_map_has_the_error_over_the_budget():
    ratio, where = map_of(tail_wrong)
    assert ratio.shape == (40, 3) and where == ""
    assert (ratio[:32] <= 1).all() and (ratio[32:] > 1000).all()


def test_the_worst_head_is_named():
    def one_head(q, k, v):
        y = right(q, k, v)
        y[0, 1] += 0.5
        y[1, 2, 3] = np.nan
        return y

    ratio, where = map_of(one_head, lead=(2, 3))
    assert where == " in head (1, 2)" and np.isnan(ratio[3]).all()
    ratio, where = map_of(
        lambda q, k, v: right(q, k, v) + np.arange(4, dtype="f")[:, None, None], lead=(4,)
    )
    assert where == " in head 3"


def test_a_large_map_keeps_its_largest_cells():
    x = np.zeros((1000, 3))
    x[777, 1], x[5, 2] = 9.0, np.nan
    small, steps = html_of.pooled(x)
    assert small.shape == (250, 3) and steps == [4, 1]
    assert small[777 // 4, 1] == 9 and np.isnan(small[1, 2]) and np.nansum(small) == 9


@pytest.mark.parametrize("lost", [0, 1, 12])
def test_any_map_can_be_drawn(lost):
    pytest.importorskip("matplotlib")
    ratio = np.full(12, 1e-9)
    ratio[:lost] = np.nan
    ratio = ratio.reshape(4, 3)
    first, second = (html_of.draw(ratio, "y", "title") for _ in range(2))
    assert first == second and first.startswith(b"\x89PNG")


def test_what_is_nan_is_counted_in_the_title():
    page = ask(tail_nan)._repr_html_()
    assert re.search(r'alt="[^"]*24 of 120 entries NaN or infinite', page)
    page = ask(lambda q, k, v: right(q, k, v) * np.float32(np.nan))._repr_html_()
    assert re.search(r'alt="[^"]*every entry is NaN or infinite', page)
