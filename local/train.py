#!/usr/bin/env python3
"""Train one phase: one YAML, one process (or one torchrun), one experiment folder.

  local/train.py --config egs/librispeech/two_pass/conf/mini/teacher.yaml --exp-dir DIR \\
      --set data.fbank_dir=DIR --set data.lang_dir=DIR [--set optim.lr=1e-3 ...]

A run that was stopped goes on by itself from its newest checkpoint when the same command is given again.
Several GPUs of one machine:   torchrun --nproc_per_node 4 local/train.py ...
Several machines, on each one: torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d \\
                                   --rdzv_endpoint FIRST_MACHINE:29500 local/train.py ...
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.config import load_config  # noqa: E402
from transducer_kd.log import UserError, run_main, setup_logging  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="phase YAML, see egs/librispeech/*/conf/")
    parser.add_argument(
        "--exp-dir", type=Path, required=True, help="where checkpoints, logs and TensorBoard go"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, e.g. optim.lr=1e-3",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (the GPU where there is one), cpu, cuda or cuda:N"
    )
    parser.add_argument(
        "--reuse",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="take over the training in this folder if it is this very phase, perhaps of another recipe; may "
        "be repeated",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="require a checkpoint to go on from")
    group.add_argument("--restart", action="store_true", help="move an earlier run aside and begin anew")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    setup_logging()
    config = load_config(args.config, args.set)
    # Imported late: --help and a mistyped option should answer at once.
    import torch

    from transducer_kd import build
    from transducer_kd.train import checkpoint, ddp, experiment, reuse
    from transducer_kd.train.trainer import Trainer

    processes = ddp.setup(args.device)
    try:
        log_file = args.exp_dir / "log" / f"log-train-{processes.rank}.txt"
        # With --restart, what is in exp_dir may yet move.
        setup_logging(None if args.restart else log_file, processes.rank, processes.world_size)
        if config.train.num_threads:
            torch.set_num_threads(config.train.num_threads)
        if args.resume and checkpoint.find_resume_point(args.exp_dir) is None:
            raise UserError(
                f"--resume: {args.exp_dir} holds no readable checkpoint; leave --resume out to start"
            )
        tokenizer = build.build_tokenizer(config.data)
        objective, origins = build.build_objective(config, tokenizer)
        data = build.build_data(
            config.data,
            tokenizer,
            processes.world_size,
            processes.rank,
            soft_targets=config.distill.stored,
            needs_text=config.objective != "wav2vec2",
        )
        validator = build.Validator(data, tokenizer, config.train.valid_wer_utterances, processes.device)
        trainer = Trainer(
            objective, config, args.exp_dir, processes.device, data.train_batches, validator, tokenizer.sha256
        )
        if args.restart:
            data.load_training()
            ddp.barrier()  # no process was refused anything: the earlier run has to make room
            if processes.rank == 0:
                experiment.set_aside(args.exp_dir)
            ddp.barrier()
            setup_logging(log_file, processes.rank, processes.world_size)
        if args.reuse:
            ddp.barrier()  # all log files are open, and move with their folder
            is_taken = processes.rank == 0 and reuse.take_over(
                args.exp_dir, args.reuse, config, tokenizer.sha256, origins
            )
            if ddp.all_reduce_sum([float(is_taken)])[0]:
                return 0
        model = objective.model
        if processes.rank == 0:
            total = sum(p.numel() for p in model.parameters())
            sizes = {"deployed": model.deployed_parameters(), "total": total}
            experiment.prepare_exp_dir(args.exp_dir, config, total, origins)
            meta = {"bpe_sha256": tokenizer.sha256, "parameters": sizes, "loss_backend": objective.backend}
            experiment.write_meta(args.exp_dir, {**meta, "origins": origins})
            logging.info("%s/%s, loss on %s", config.recipe, config.phase, objective.backend)
            logging.info("parameters\n%s", model.parameter_table())
        ddp.barrier()
        finished = trainer.run()
    finally:
        ddp.cleanup()
    # 143 is what a shell reports for SIGTERM: the stage did not finish, and the same command goes on.
    return 0 if finished else 143


if __name__ == "__main__":
    run_main(main)
