import builtins
import io
import subprocess
import sys

import pytest
from eval_helpers import NextWord, records, word_tokenizer
from rich.console import Console

from easyedit_wise.evaluation.final import collect_baseline, score_model
from easyedit_wise.reports.plots import plot_routing
from easyedit_wise.reports.tables import AnswerRow, answer_rows, answers_table, scores_table

GROUPS = {
    "edit prompts": [9.0, 11.0, 14.0],
    "rephrasings": [3.0, 7.0, 12.0, 5.0],
    "nearby prompts": [1.0, 2.5],
    "unrelated prompts": [0.2, 0.4, 0.3],
}


def printed(table, width=140):
    console = Console(width=width, record=True, color_system=None, file=io.StringIO())
    console.print(table)
    return console.export_text()


# Tables


def test_answer_rows_of_scored_records():
    tok = word_tokenizer()
    before = {"b": "q", "h": "q", "j": "k", "k": "l", "m": "n"}
    baseline = collect_baseline(NextWord(before).eval(), tok, records(), max_new_tokens=2)
    after = NextWord(before | {"b": "c", "c": "d", "m": "o"}).eval()
    rows = answer_rows(baseline, score_model(after, tok, records(), baseline))
    assert [(row.fact, row.kind, row.correct) for row in rows] == [
        ("a → c d", "edit", True),
        ("a → c d", "rephrasing", True),
        ("a → c d", "rephrasing", False),
        ("a → c d", "unrelated", True),
        ("g → i", "edit", False),
        ("g → i", "nearby", False),
        ("g → i", "unrelated", True),
    ]
    assert rows[0].after == "c d"
    assert rows[0].before.startswith("q")
    assert "✗" in printed(answers_table(rows))


def test_answers_table_marks_and_groups():
    rows = [
        AnswerRow("France → Lyon", "edit", "The capital of France is", " Paris.\n\nThe", " Lyon.", True),
        AnswerRow("France → Lyon", "nearby", "The capital of Germany is", " Berlin", " Lyon", False),
        AnswerRow("Water → oxygen", "edit", "Water is made of hydrogen and", " helium", " oxygen", True),
    ]
    table = answers_table(rows)
    text = printed(table)
    assert table.row_count == 3
    assert text.count("France → Lyon") == 1
    assert text.count("✓") == 2
    assert text.count("✗") == 1
    assert "Paris. …" in text


def test_brackets_in_an_answer_are_no_markup():
    rows = [AnswerRow("[bold]x", "edit", "[red]p[/red]", "[/nonsense]", "[link=a]b", True)]
    text = printed(answers_table(rows))
    for shown in ("[bold]x", "[red]p[/red]", "[/nonsense]", "[link=a]b"):
        assert shown in text


def test_scores_table():
    before = {"reliability": 0.125, "nearby_kept": 1.0, "perplexity": None, "rows": []}
    after = {
        "reliability": 0.95,
        "nearby_kept": 0.5,
        "perplexity": 1234.5,
        "generalisation": None,
        "rows": [],
    }
    table = scores_table(before, after, {"reliability": 0.9, "nearby_kept": 0.8, "perplexity": 2000})
    lines = printed(table).splitlines()

    def line_of(name):
        return next(line for line in lines if name in line)

    assert table.row_count == 3
    assert all(part in line_of("Reliability") for part in ("0.125", "0.950", "≥ 0.900", "✓"))
    assert "✗" in line_of("Nearby")
    assert all(part in line_of("Perplexity") for part in (" - ", "1.23e+03", "≤ 2e+03", "✓"))
    assert "Target" not in printed(scores_table(before, after))


def test_tables_refuse_what_they_cannot_show():
    with pytest.raises(ValueError, match="no answers"):
        answers_table([])
    with pytest.raises(ValueError, match="no scores"):
        scores_table({}, {"rows": []})
    with pytest.raises(ValueError, match="targets localty"):
        scores_table({}, {"locality": 1.0}, {"localty": 0.9})


# The plot


@pytest.mark.parametrize(("epsilon", "normalised"), [(4.0, False), ([4.0, 5.0, 6.0], False), (None, True)], ids=str)
def test_plot_is_a_png(tmp_path, epsilon, normalised):
    path = plot_routing(GROUPS, epsilon, tmp_path / "new" / "routing.png", normalised=normalised)
    assert path == tmp_path / "new" / "routing.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_is_the_same_in_every_run(tmp_path):
    one, other = (plot_routing(GROUPS, 4.0, tmp_path / name).read_bytes() for name in ("1.png", "2.png"))
    assert one == other


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "groups",
    [
        {"one": [1.0]},
        {"all zero": [0.0, 0.0]},
        {"zero and wide": [0.0, 0.01, 100.0]},
        {"wide": [1e-6, 1e6]},
        {"close": [4.0, 4.0001]},
        {str(i): [float(i + 1)] for i in range(9)},
    ],
    ids=lambda groups: next(iter(groups)),
)
def test_plot_takes_any_span(tmp_path, groups):
    assert plot_routing(groups, 4.0, tmp_path / "routing.png").stat().st_size > 1000


def test_plot_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys; from easyedit_wise.reports.plots import plot_routing; "
        "early = 'matplotlib' in sys.modules; plot_routing({'a': [1.0]}, 1.0, sys.argv[1]); "
        "sys.exit(early or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=False).returncode == 0


@pytest.mark.parametrize(
    ("groups", "epsilon", "message"),
    [
        ({}, 1.0, "no groups"),
        ({"edits": []}, 1.0, "'edits' has no routing score"),
        ({"edits": [float("nan")]}, 1.0, "'edits' has the routing score nan"),
        ({"edits": [-1.0]}, 1.0, "not negative"),
        ({"edits": [1.0]}, None, "needs the threshold"),
        ({"edits": [1.0]}, [], "one finite number"),
        ({"edits": [1.0]}, [1.0, float("inf")], "one finite number"),
    ],
)
def test_plot_errors(tmp_path, groups, epsilon, message):
    with pytest.raises(ValueError, match=message):
        plot_routing(groups, epsilon, tmp_path / "routing.png")
    assert not list(tmp_path.iterdir())


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'easyedit_wise\[plots\]'"):
        plot_routing(GROUPS, 4.0, tmp_path / "routing.png")
