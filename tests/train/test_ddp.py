"""Several processes: the same gradients as one, and clear words for a wrong environment or device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transducer_kd.log import UserError
from transducer_kd.train import ddp

sys.path.insert(0, str(Path(__file__).parent))
import ddp_worker  # noqa: E402

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_two_processes(folder, objective):
    """Two gloo processes of ddp_worker.py, started as torchrun starts them."""
    port, root = str(free_port()), Path(__file__).resolve().parents[2]
    workers = []
    for rank in range(2):
        place = {**TORCHRUN, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        workers.append(
            subprocess.Popen(
                [sys.executable, ddp_worker.__file__, str(folder), objective],
                env={**os.environ, **place, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [w.communicate(timeout=120)[0] for w in workers]
    finally:
        for w in workers:
            w.kill()
    assert [w.returncode for w in workers] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"gradients-{rank}.pt") for rank in range(2)]


OF_A_BATCH = ("perplexity_0", "perplexity_1", "diversity_loss")  # and no sum over its utterances


def means_logged(exp_dir):
    """What the last line of training says, without the times."""
    lines = [json.loads(line) for line in (exp_dir / "train_log.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line.pop("kind") == "train"]
    others = ("audio_s_per_s", "elapsed_s", *OF_A_BATCH)
    return {name: value for name, value in line.items() if name not in others}


@pytest.mark.parametrize("objective", ddp_worker.OBJECTIVES)
def test_two_processes_give_the_gradients_of_one(tmp_path, objective):
    """Uneven shares of accumulated batches, one of them poisoned on one rank alone; of the updates with soft
    targets each has them on one rank alone.
    """
    alone = ddp_worker.train(tmp_path / "alone", objective)
    ranks = run_two_processes(tmp_path, objective)
    assert len(alone["gradients"]) == 2
    is_las = [name.startswith("las.") for name in alone["gradients"][0]]
    assert any(is_las) == (objective in ("las", "two_pass")) and all(is_las) == (objective == "las")
    for rank in ranks:
        assert len(rank["gradients"]) == 2
        assert rank["dropped"] == alone["dropped"] == 1
        assert rank["audio_s"] == pytest.approx(alone["audio_s"])
        assert rank["sums"] == [3.0, 20.0]
        for part, kept in alone["masks"].items():
            assert torch.equal(rank["masks"][part], kept)
            assert kept.tolist() != ddp_worker.KEPT[part] or part == "heads"  # one of two is kept
        for got, expected in zip(rank["gradients"], alone["gradients"]):
            assert got.keys() == expected.keys()
            for name in expected:
                scale = expected[name].abs().max().item()
                torch.testing.assert_close(got[name], expected[name], atol=1e-5 * scale + 1e-7, rtol=1e-3)
    logged, expected = (means_logged(tmp_path / name) for name in ("exp", "alone"))
    # Of pretraining they are ratios of each batch, and so not quite the same when it is shared out.
    assert logged == pytest.approx(expected, rel=0.01 if objective == "wav2vec2" else 1e-4)
    if objective == "distill":
        assert 0 < logged["kd_share"] < 1 and logged["kd_loss"] > 0
    saved = torch.load(tmp_path / "exp" / "epoch-1.pt")
    assert saved["progress"]["step"] == 2
    # The second rank saves nothing but its own bad batch.
    assert "epoch-1.pt" in ranks[0]["saved"] and "epoch-1.pt" not in ranks[1]["saved"]


def set_environment(monkeypatch, **variables):
    for name in (*TORCHRUN, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_alone_everything_is_a_no_op(monkeypatch):
    set_environment(monkeypatch)
    assert ddp.setup("cpu") == ddp.Processes(0, 1, torch.device("cpu"))
    assert (ddp.rank(), ddp.world_size(), ddp.is_main(), ddp.is_running()) == (0, 1, True, False)
    assert ddp.all_reduce_sum([1.5, 2.0]) == [1.5, 2.0]
    module = torch.nn.Linear(2, 2)
    assert ddp.wrap(module, torch.device("cpu")) is module
    with ddp.no_sync(module):
        ddp.barrier()
    ddp.cleanup()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"LOCAL_RANK": None, "MASTER_PORT": None}, "RANK, WORLD_SIZE set but not LOCAL_RANK, MASTER_PORT"),
        ({"RANK": None}, "LOCAL_RANK, WORLD_SIZE set but not RANK: start several processes with torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"MASTER_PORT": "none"}, "process 0 of 2 cannot meet the others at 127.0.0.1:none"),
    ],
)
def test_half_an_environment_is_named(monkeypatch, changes, message):
    wanted = {**TORCHRUN, **changes}
    set_environment(monkeypatch, **{k: v for k, v in wanted.items() if v is not None})
    with pytest.raises(UserError, match=message):
        ddp.setup("cpu")


@pytest.mark.parametrize(
    "device,processes_here,message",
    [
        ("gpu", 1, "--device gpu: use auto, cpu, cuda or cuda:N"),
        ("cuda:x", 1, "--device cuda:x: use auto"),
        ("cuda:2", 1, "process 0 needs GPU 2, but 2 are usable"),
        ("cuda:0", 2, "names one GPU for 2 processes; use --device cuda"),
    ],
)
def test_wrong_device_is_named(monkeypatch, device, processes_here, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=message):
        ddp._choose_device(device, 0, processes_here)


def test_each_process_takes_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ddp._choose_device("auto", 1, 2) == torch.device("cuda", 1)
    assert ddp._choose_device("cuda", 0, 2) == torch.device("cuda", 0)
    assert ddp._choose_device("cpu", 1, 2) == torch.device("cpu")
    with pytest.raises(UserError, match="process 2 needs GPU 2, but 2 are usable here"):
        ddp._choose_device("cuda", 2, 3)
