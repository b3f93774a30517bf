"""What a long evaluation says of itself."""

from ropewalk.evaluation.progress import told


def test_every_item_is_given_and_said(capsys):
    assert list(told("abc", "prompts", every=0)) == ["a", "b", "c"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(", ETA")[0].strip() for line in lines] == ["1 of 3 prompts", "2 of 3 prompts"]


def test_short_work_says_nothing(capsys):
    assert list(told(range(5), "prompts", every=1e9)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out == ""
