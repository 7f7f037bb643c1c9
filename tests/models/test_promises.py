"""The figures of docs/promises.md."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, build, train, train_args, train_workers, valid_batch
from gate_kit import Words
from layer_kit import PAD, D, layer

from fairseq_evomoe.kernels.lookup.lookup import lookup
from fairseq_evomoe.modules.gates import GATES
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.modules.plan import TokenBatch

BATCHES = (2, 8, 32)
MODELS = {
    "dense": ("--moe-freq", 0),
    "dts": ("--moe-gate", "dts", "--moe-gate-init-std", 0.5),
    "switch": ("--moe-gate", "switch", "--moe-gate-init-std", 0.5),
    "hash": ("--moe-gate", "hash"),
    "base": ("--moe-gate", "base", "--moe-gate-init-std", 0.5),
    "stable": ("--moe-gate", "stable", "--moe-gate-init-std", 0.5),
    "memoryformer": ("--memory-ffn", "--memory-attention", "--memory-bits", 4, "--moe-freq", 0),
}


def batch_difference(toy, name, *flags):
    """Largest difference of a sentence's logits alone and in batches of 2, 8 and 32."""
    flags = (*MODELS[name], "--evo-spawn-update", 0, "--max-update", 50, *flags)
    _, task, model = build(toy, *flags)
    model.set_num_updates(99)
    model.eval()
    task.load_dataset("valid")
    data = task.dataset("valid")
    logits = lambda rows: model(**data.collater([data[i] for i in rows])["net_input"])[0]
    far = 0.0
    with torch.no_grad():
        # the batch comes sorted by length, as fairseq makes it
        ids = [data.collater([data[i] for i in range(b)])["id"].tolist() for b in BATCHES]
        alone = {i: logits([i])[0] for i in range(max(BATCHES))}
        for size, order in zip(BATCHES, ids, strict=True):
            together = logits(range(size))
            for row, i in enumerate(order):
                own = together[row, : len(alone[i])]
                far = max(far, float((own - alone[i]).abs().max()))
    return far


@pytest.mark.parametrize("name", MODELS)
def test_a_sentence_alone_and_in_batches(toy, name):
    """Logits differ by 2e-5 at most."""
    assert batch_difference(toy, name) <= 2e-5


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL")
def test_bitwise_equality_can_be_asked_for(toy):
    """With MKL_CBWR=AVX2,STRICT, one path for all numbers of tokens and lengths in steps of 16,
    logits are equal to the bit."""
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/kits', 'tests/models']\n"
        "import pathlib, test_promises as t\n"
        f"toy = pathlib.Path({str(toy)!r})\n"
        "flags = ('--left-pad-source', '--required-seq-len-multiple', 16)\n"
        "print([t.batch_difference(toy, name, *flags) for name in t.MODELS])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "MKL_CBWR": "AVX2,STRICT",
            "EVOMOE_BACKEND": "native",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().split("\n")[-1] == str([0.0] * len(MODELS))


@pytest.mark.parametrize("name", ["dense", "dts", "memoryformer"])
def test_hypotheses_alone_and_in_batches(toy, name):
    """Beam search finds the same translations whatever the batch."""
    _, task, model = build(toy, *MODELS[name], "--evo-spawn-update", 0, "--max-update", 50)
    model.set_num_updates(99)
    model.eval()
    task.load_dataset("valid")
    data = task.dataset("valid")
    generator = task.build_generator([model], task.cfg)
    generator.max_len_b = 12

    def hypotheses(rows):
        batch = data.collater([data[i] for i in rows])
        found = task.inference_step(generator, [model], batch)
        return dict(
            zip(batch["id"].tolist(), [h[0]["tokens"].tolist() for h in found], strict=True)
        )

    together = hypotheses(range(32))
    for size in (1, 2, 8):
        for start in range(0, 32, size):
            for i, tokens in hypotheses(range(start, start + size)).items():
                assert tokens == together[i]


@pytest.mark.parametrize("gate", [g for g in GATES if g != "expert_choice"])
def test_routing_is_the_same_in_every_use(toy, gate):
    """Teacher forcing, incremental decoding and validation send each token to the same experts."""
    cfg, task, model = build(
        toy,
        *("--moe-gate", gate, "--moe-freq", 1, "--moe-gate-init-std", 0.5, "--max-update", 50),
        *("--evo-spawn-update", 0),
    )
    model.set_num_updates(99)
    model.eval()
    batch = valid_batch(task, rows=6)
    net_input = batch["net_input"]
    previous = net_input["prev_output_tokens"]
    seen: dict[str, list[torch.Tensor]] = {}
    for name, one in moe_layers(model):
        if name.startswith("decoder"):
            keep = lambda module, args, plan, name=name: seen.setdefault(name, []).append(
                plan.active
            )
            one.gate.register_forward_hook(keep)

    def active(run):
        """Layer -> experts of every real target token, in order of sentence and position."""
        seen.clear()
        with torch.no_grad():
            run()
        return dict(seen)

    real = previous.ne(PAD)
    # a layer's rows are ordered by position first
    order = real.t().flatten()
    forced = active(lambda: model(**net_input))

    def step_by_step():
        encoded = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
        state = {}
        for t in range(previous.size(1)):
            model.decoder(previous[:, : t + 1], encoder_out=encoded, incremental_state=state)

    criterion = task.build_criterion(cfg.criterion).eval()
    for other in (active(step_by_step), active(lambda: criterion(model, batch))):
        for name, plans in forced.items():
            assert torch.equal(torch.cat(plans), torch.cat(other[name])), name
            assert len(torch.cat(plans)) == int(order.sum())


@pytest.mark.parametrize("gate", ["dts", "switch", "hash"])
@pytest.mark.parametrize("workers", [1, 2])
def test_gradients_of_workers_and_micro_batches(toy, tmp_path, gate, workers):
    """N workers x M micro-batches give one worker's gradient of the same batches, by parameter.

    Adam's first moment after one update is a tenth of the gradient.
    """
    flags = ("--moe-gate", gate, "--evo-spawn-update", 0, "--max-update", 1, "--clip-norm", 0)
    flags += ("--dts-noise", "none") if gate == "dts" else ()
    flags += ("--dropout", 0, "--dts-anneal-updates", 1) if gate == "dts" else ("--dropout", 0)
    moments = []
    for n, folder in ((1, "one"), (workers, "many")):
        rows = {"one": 4, "many": 4 // n}[folder]
        args = train_args(toy, tmp_path / folder, *flags, "--update-freq", rows)
        train(*args) if n == 1 else train_workers(n, *args)
        path = tmp_path / folder / "checkpoint_last.pt"
        state = torch.load(path, weights_only=False)["last_optimizer_state"]["state"]
        moments.append([s["exp_avg"] for s in state.values()])
    for one, many in zip(*moments, strict=True):
        assert torch.allclose(many, one, rtol=1e-4, atol=1e-6 + 1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_offsets_beyond_2_31(dtype):
    """A table of more than 2^31 entries is read at its end; its pages are never all touched."""
    bits, width = 16, 33000
    tables = torch.zeros(1, 2**bits, width, dtype=dtype)
    assert tables.numel() > 2**31
    tables[0, -1] = torch.arange(width).remainder(5).to(dtype)
    scale = torch.full((1, 2**bits), 0.5) if dtype == torch.int8 else None
    z = torch.full((2, 1, bits), 3.0)
    z[1] = -3.0
    with torch.no_grad():
        y = lookup(z, tables, score="l1", row_scale=scale)
    assert y[1].abs().max() == 0 and y[0].max() > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", ["none", "no sentence", "one", "all pads"])
@pytest.mark.parametrize("gate", GATES)
def test_batches_of_next_to_nothing(gate, tokens, training):
    """Zero tokens, one token and only padding go through every gate, forward and backward."""
    made = layer(n=6, has_split=True, moe_gate=gate, dictionary=Words())
    made.train(training)
    rows, length = {"none": (2, 0), "no sentence": (0, 3), "one": (1, 1), "all pads": (2, 3)}[
        tokens
    ]
    x = torch.randn(length, rows, D, requires_grad=True)
    ids = torch.full((rows, length), PAD if tokens == "all pads" else 5)
    y = made(x, TokenBatch(ids, PAD))
    assert y.shape == x.shape and bool(torch.isfinite(y).all())
    y.sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
