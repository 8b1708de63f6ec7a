"""Values of command line options."""

import argparse

import pytest

from transducer_kd.arguments import check_epoch, number, split_list


@pytest.mark.parametrize(("lowest", "given", "value"), [(1, "1", 1), (0, "7", 7), (0.0, "0.5", 0.5)])
def test_a_number_in_range_keeps_its_type(lowest, given, value):
    found = number(lowest)(given)
    assert found == value
    assert type(found) is type(lowest)


@pytest.mark.parametrize(
    ("lowest", "given", "message"),
    [(1, "0", "must be 1 or more, not 0"), (0.0, "0", "must be greater than 0, not 0")],
)
def test_a_number_out_of_range_is_refused(lowest, given, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        number(lowest)(given)


@pytest.mark.parametrize("given", ["x", "1.5"])
def test_what_is_no_integer_is_refused(given):
    with pytest.raises(ValueError, match=given):
        number(1)(given)


def test_a_list_names_each_once_in_its_order():
    assert split_list(["b, a", "a,,c", " "]) == ["b", "a", "c"]


@pytest.mark.parametrize("averaged", [{"avg": 2}, {"use_averaged_model": True}])
def test_the_best_checkpoint_has_no_average(averaged, capsys):
    args = argparse.Namespace(**{"epoch": -1, "avg": 1, "use_averaged_model": False, **averaged})
    with pytest.raises(SystemExit):
        check_epoch(argparse.ArgumentParser(), args)
    assert "best-valid.pt" in capsys.readouterr().err


def test_averages_of_other_epochs_pass():
    check_epoch(argparse.ArgumentParser(), argparse.Namespace(epoch=5, avg=2, use_averaged_model=True))
