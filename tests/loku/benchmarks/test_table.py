"""The table of results and the leaderboard's rows, from entries that are written here."""

import pytest

from loku.benchmarks import Muse, Rwku, Tdec, Tofu, Wmdp, leaderboard_rows, markdown_table
from loku.benchmarks.results import Results


def entry(kind, group, split="forget10", **more):
    values = {"measures": {}, "leaderboard": {}, "not_available": {}, "settings": {}, "limit": None}
    return {"kind": kind, "group": group, "split": split, "model": "M", "method": "ihl", **values, **more}


def lines(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_seeds_share_a_row_and_settings_have_rows_of_their_own():
    found = [
        entry("before", "a", measures={"forget_quality": 4.35e-25, "model_utility": 0.63}),
        *(
            entry("unlearned", "b", settings={"seed": s, "beta": 0.1}, measures={"forget_quality": q})
            for s, q in ((0, 0.25), (1, 0.75))
        ),
        entry("unlearned", "c", settings={"seed": 0, "beta": 0.2}, measures={"forget_quality": None}),
        entry("retain", "d", measures={"forget_quality": 1.0}),
    ]
    head, _, *rows = lines(markdown_table(Tofu(), found))
    assert head.startswith("| split | model | forget_quality ↑ | model_utility ↑ | forget_truth_ratio ↑ |")
    starts = [" | ".join(row.strip("| ").split(" | ")[:3]) for row in rows]
    assert starts == [
        "forget10 | before unlearning | 4.35e-25",
        "forget10 | retain-only model | 1.000",
        "forget10 | ihl, beta 0.1 | 0.500 ± 0.354",
        "forget10 | ihl, beta 0.2 | -",
    ]
    assert [row.split(" | ")[-1] for row in rows] == ["1 |", "1 |", "2 |", "1 |"]


def test_the_reasons_and_the_shared_settings_are_told():
    reason = {"forget_quality": "there is no twin"}
    found = [
        entry("before", "a", not_available=reason),
        entry("unlearned", "b", settings={"max_steps": 3, "seed": 1}, not_available=reason),
    ]
    text = markdown_table(Tofu(), found)
    assert text.count("forget_quality is not available: there is no twin.") == 1
    assert "Model: `M`. Settings of all runs: max_steps 3." in text
    assert "first N rows" not in text
    assert "first N rows" in markdown_table(Tofu(), [entry("before", "a", limit=2)])


def test_people_are_samples_and_other_data_is_not():
    people = [
        entry("unlearned", "b", split=name, measures={"Forget FB": value})
        for name, value in (("Ann", 0.2), ("Bo", 0.4))
    ]
    (row,) = lines(markdown_table(Rwku(), people))[2:]
    assert row.startswith("| mean of 2 | ihl | 0.300 ± 0.141 |")
    # the same settings on another version of the data
    twice = [entry("unlearned", group, measures={"model_utility": 0.5}) for group in "bc"]
    assert [row.split(" | ")[1] for row in lines(markdown_table(Tofu(), twice))[2:]] == ["ihl", "ihl (2)"]
    assert "number in brackets" in markdown_table(Tofu(), twice)
    assert "number in brackets" not in markdown_table(Tofu(), twice[:1])


def test_the_leaderboard_has_the_cells_of_open_unlearning():
    figures = {
        "forget_knowmem_ROUGE": 0.64,
        "forget_verbmem_ROUGE": 0.004,
        "privleak": -99.81,
        "retain_knowmem_ROUGE": 0.555,
    }
    found = [
        entry("before", "a", split="News", leaderboard=figures),
        entry("unlearned", "b", split="News-scal2"),
    ]
    text = leaderboard_rows(Muse(), found)
    cells = ["0.64", "4.00e-03", "-99.81", "0.56", "", "", "", ""]
    shown = "".join(f"  <td>{cell}</td>\n" for cell in cells)
    assert text == f"<tr>\n  <th>Finetuned</th>\n{shown}</tr>\n"
    with pytest.raises(ValueError, match="no table of wmdp"):
        leaderboard_rows(Wmdp(), found)
    with pytest.raises(ValueError, match="has News, Books alone"):
        leaderboard_rows(Muse(), found[1:])


def test_the_leaderboard_keeps_apart_what_the_table_does():
    """A quick look at the first rows, or other data, is no part of a mean with the whole."""

    def model_utility(value, group, **more):
        return entry("before", group, leaderboard={"model_utility": value}, **more)

    found = [
        model_utility(0.1, "a", limit=2),
        model_utility(0.6, "b"),
        model_utility(0.4, "c"),
        entry("retain", "d", leaderboard={"model_utility": 0.2}),
        entry("retain", "e", leaderboard={"model_utility": 0.5}, limit=3),
    ]
    text = leaderboard_rows(Tofu(), found)
    heads = ["Finetuned, first 2 rows", "Finetuned", "Finetuned (2)", "Retain", "Retain, first 3 rows"]
    assert [line[6:-5] for line in text.splitlines() if "<th>" in line] == heads
    cells = [line[6:-5] for line in text.splitlines() if "<td>" in line]
    assert cells == ["", "0.10", "", "0.60", "", "0.40", "", "0.20", "", "0.50"]


def test_the_news_and_the_books_model_share_a_row_of_the_leaderboard():
    found = [
        entry(kind, f"{kind} {split}", split=split, model=f"{kind} {split}", leaderboard={"privleak": value})
        for kind in ("before", "retain", "unlearned")
        for split, value in (("News", 1.0), ("Books", 2.0))
    ]
    text = leaderboard_rows(Muse(), found)
    heads = [line[6:-5] for line in text.splitlines() if "<th>" in line]
    assert heads == ["Finetuned", "Retain", "ihl"]
    cells = [line[6:-5] for line in text.splitlines() if "<td>" in line]
    assert cells == ["", "", "1.00", "", "", "", "2.00", ""] * 3
    # two models of one split are told apart
    found.append(entry("before", "z", split="News", model="another", leaderboard={"privleak": 3.0}))
    heads = [line[6:-5] for line in leaderboard_rows(Muse(), found).splitlines() if "<th>" in line]
    assert {"Finetuned, before News", "Finetuned, another", "Finetuned"} <= set(heads)


def test_samples_of_other_sizes_have_rows_of_their_own(tmp_path):
    for benchmark, splits, means in (
        (
            Tdec(),
            ["lm_extraction_4_0", "lm_extraction_4_1", "lm_extraction_32_0", "lm_extraction_32_1", "a_1+b_2"],
            ["mean of 2 lm_extraction_4", "mean of 2 lm_extraction_32", "a_1+b_2"],
        ),
        (Rwku(), ["Ann", "Bo", "Ann; Bo", "Bo; Cy"], ["mean of 2", "mean of 2 sets of 2 people"]),
    ):
        results = Results(tmp_path / benchmark.name, benchmark)
        results.folder.mkdir()
        for split in splits:
            identity = {"split": split, "data": split, "settings": {"seed": 0}}
            results.add(identity, entry("unlearned", "", split=split, settings={"seed": 0}))
        assert [row.strip("| ").split(" | ")[0] for row in lines(results.table())[2:]] == means


def test_a_sample_whose_data_has_changed_is_no_second_sample():
    found = [
        entry("unlearned", "a", split=split, settings={"seed": 0}, measures={"EL10": value})
        for split, value in (("x_0", 0.1), ("x_1", 0.3), ("x_0", 0.9))
    ]
    text = markdown_table(Tdec(), found)
    starts = [" | ".join(row.strip("| ").split(" | ")[:3]) for row in lines(text)[2:]]
    assert starts == ["mean of 2 x | ihl | 0.200 ± 0.141", "x_0 | ihl | 0.900"]
