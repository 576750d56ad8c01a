"""The commonest mistakes of a command line, and that each message says what would have been right."""

import pytest

from trainer.cli.main import main

QUICK = ("train", "quickstart")
MISTAKES = [
    # what was typed, and what the message must hold
    ((*QUICK, "optimizer.lrr=0.1"), "did you mean optimizer.lr?"),
    ((*QUICK, "--optimizer.lr=0.1"), "write optimizer.lr=0.1"),
    ((*QUICK, "--lr", "0.1"), "write optimizer.lr=0.1"),
    ((*QUICK, "--batch-size", "64"), "write data.batch_size=64"),
    ((*QUICK, "optimizer.lr", "0.1"), "did you mean optimizer.lr=0.1?"),
    ((*QUICK, "optimizer.lr:", "0.1"), "did you mean optimizer.lr=0.1?"),
    ((*QUICK, "optimizer.lr", "=", "0.1"), "did you mean optimizer.lr=0.1?"),
    ((*QUICK, "lr=0.1"), "did you mean optimizer.lr=0.1?"),
    ((*QUICK, "batch_size=64"), "did you mean data.batch_size?"),
    ((*QUICK, "exclude=fc"), "did you mean sparsity.exclude?"),
    ((*QUICK, "sparsity.exclude=fc"), "did you mean sparsity.exclude=[fc]?"),
    ((*QUICK, "sparsity=0.9"), "did you mean sparsity.target=0.9?"),
    ((*QUICK, "sparsity.target=90"), "did you mean sparsity.target=0.9?"),
    ((*QUICK, "sparsity.target=90%"), "did you mean sparsity.target=0.9?"),
    ((*QUICK, "optimizer.lr=O.1"), "did you mean optimizer.lr=0.1?"),
    ((*QUICK, "optimizer.lr=0,1"), "did you mean optimizer.lr=0.1?"),
    ((*QUICK, "engine.precision=float16"), "did you mean engine.precision=fp16?"),
    ((*QUICK, "data.augment=RandAugment"), "did you mean data.augment=rand?"),
    ((*QUICK, "epochs=3"), "write epochs=14, or for 3 epochs 'sparsity.schedule=dense 1, sparse 2'"),
    ((*QUICK, "model=resnet50"), "did you mean model.name=resnet50?"),
    (("train", "quickstrat"), "did you mean 'quickstart'?"),
    (("train", "imagenet/resnet5O_90"), "did you mean 'imagenet/resnet50_90'?"),
]


@pytest.mark.parametrize(("typed", "right"), MISTAKES, ids=[" ".join(typed) for typed, _ in MISTAKES])
def test_the_message_says_what_would_have_been_right(typed, right, capsys):
    try:
        code = main(list(typed))
    except SystemExit as end:  # argparse's own
        code = end.code
    assert code == 2
    said = capsys.readouterr().err
    assert right in said
    assert "Traceback" not in said
