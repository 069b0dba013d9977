"""The planner on slices of TPUs, compiled for without one."""

import json
import os
import sys

import jax
import pytest

import programs
import training_runs as runs
from test_sharding import forwards, largest_array
from tiny_plans import small_tokenizer, small_transformer
from vqgan_jax.configuration import ConfigError
from vqgan_jax.models.target import planned_for
from vqgan_jax.plan import read_config, run_apart
from vqgan_jax.planning import costs, figures
from vqgan_jax.planning.hlo import Program
from vqgan_jax.planning.planner import Planner
from vqgan_jax.planning.programs import planned_programs, planned_state
from vqgan_jax.planning.topologies import Topology

pytest.importorskip("libtpu", reason="the compiler for TPUs: pip install '.[tpu]'")

PLANNER = Planner(Topology.named("v5e:2x2"))


@pytest.fixture
def quick_compiler(monkeypatch):
    """A third less time; what is left out comes after it is decided what lies and goes where."""
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    monkeypatch.setenv("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0")
    yield
    jax.config.update("jax_exec_time_optimization_effort", 0.0)


def compiled_for(topology, config, number=0):
    """The compiled program of that number, what was planned, and the mesh."""
    mesh = Topology.named(topology).mesh(config.mesh)
    with planned_for("tpu"):
        planned = planned_programs(config, mesh, None)[number]
        return planned.lower().compile(), planned, mesh


def product_flops(config, topology="v5e:2x2"):
    compiled, _, mesh = compiled_for(topology, config)
    return costs.product_flops(Program(compiled.as_text())) * mesh.size


@pytest.mark.slow
def test_scanned_layers_count_as_unrolled_ones():
    scanned, unrolled = (small_transformer(layers=4) for _ in range(2))
    unrolled.model.unroll = 4
    found = product_flops(scanned)
    assert found == pytest.approx(product_flops(unrolled), rel=0.03)
    # By arithmetic: three times the products of a forward pass, attention as a whole square.
    tokens, width, batch = 16, 128, scanned.training.batch_size
    layer = 12 * width**2 + 2 * tokens * width
    forward = tokens * (4 * layer + width * 256) * batch
    assert found == pytest.approx(6 * forward, rel=0.05)


@pytest.mark.slow
def test_accumulated_micro_batches_count_as_one_batch():
    config = small_transformer()
    whole = product_flops(config)
    config.optimizer.accumulate = 4
    assert product_flops(config) == pytest.approx(whole, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [small_transformer, small_tokenizer])
def test_a_chip_does_the_same_on_16_and_on_256(request, stage):
    """Weak scaling: at the same batch a chip, operations and memory stay, exchanges are bounded."""
    if stage is small_tokenizer:
        request.getfixturevalue("quick_compiler")
    found = {}
    for topology, chips in (("v5e:4x4", 16), ("v5e:16x16", 256)):
        config = stage(batch_size=2 * chips, data=-1, fsdp=4)
        config.model.update({"resolution": 16} if stage is small_tokenizer else {})
        compiled, planned, _ = compiled_for(topology, config)
        program, analysis = Program(compiled.as_text()), compiled.memory_analysis()
        sent = sum(costs.total_sent(costs.collectives(program)).values())
        memory = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        found[chips] = compiled.cost_analysis()["flops"], memory, sent
        # Gathered forwards and backwards over fsdp, and gradients reduced over all: in a ring less
        # than four times all parameters, however many chips.
        assert sent <= 4 * 4 * planned.bytes_held["parameters"] + 2**20
    for ours, theirs in zip(found[16][:2], found[256][:2], strict=True):
        assert ours == pytest.approx(theirs, rel=0.05)
    assert found[256][2] <= 1.5 * found[16][2]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [small_transformer, small_tokenizer])
def test_fully_sharded_steps_on_tpus_gather_one_layer_at_a_time(quick_compiler, stage):
    config = stage(batch_size=256, data=1, fsdp=-1)
    config.model.update({"resolution": 16} if stage is small_tokenizer else {})
    compiled, planned, mesh = compiled_for("v5e:2x4", config)
    limit = largest_array(planned_state(config, mesh))
    exchanges = costs.collectives(Program(compiled.as_text()))
    moved = [one for one in exchanges if one.kind in ("all-gather", "all-to-all")]
    assert max((one.bytes for one in moved), default=0) <= limit
    assert max(one.bytes for one in forwards(exchanges)) <= limit
    total = sum(one.sent for one in exchanges)
    assert 0 < total <= 6 * planned.bytes_held["parameters"] * mesh.size


@pytest.mark.slow
def test_dropout_of_attention_in_blocks_that_are_computed_again():
    """In bfloat16 the compiler needs help with it, or crashes."""
    config = small_transformer(batch_size=16)
    config.model.update(num_heads=4, attention_dropout=0.1, remat=True, grid=(8, 8))
    assert product_flops(config) > 0


def test_a_device_is_a_chip_where_its_cores_are_one():
    topology = Topology.named("v4:2x2x1")
    assert len(topology.devices) == 4 and topology.chip.flops == 275e12


@pytest.mark.slow
def test_figures_are_kept_and_read_again(quick_compiler, tmp_path, monkeypatch, capsys):
    planner = Planner(PLANNER.topology, cache=tmp_path)
    config = small_tokenizer(batch_size=8, resolution=16)
    plan, fits = planner.plan(config)
    assert fits
    output = capsys.readouterr().out
    assert output.startswith("v5e:2x2: 4 x TPU v5 lite (data 4), batch 8, 2 a chip\n")
    for name in ("generator step", "discriminator step", "tokenising"):
        assert f"\n{name}  " in output
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)  # nothing is compiled again
    assert Planner(PLANNER.topology, cache=tmp_path).plan(config)[0] == plan
    (generator, *_) = plan["programs"]
    held = generator["memory"]
    parts = sum(size for kind, size in held.items() if kind != "all")
    assert held["all"] == pytest.approx(parts, rel=0.01)
    assert generator["seconds"]["compute"] == pytest.approx(generator["flops"] / 197e12)
    assert plan["images_per_second"] > 0
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TypeError, match="not callable"):  # damaged ones are
        planner.plan(config)


@pytest.mark.parametrize(
    "end, words", [("SIGSEGV", r"crashed \(SIGSEGV\).* libtpu 0\."), ("SIGKILL", "memory is full")]
)
def test_a_compiler_that_crashes(end, words):
    program = f"import os, signal; os.kill(os.getpid(), signal.{end})"
    with pytest.raises(ConfigError, match=words):
        run_apart([sys.executable, "-c", program])


@pytest.mark.slow
def test_what_does_not_fit(tmp_path, capsys):
    """The compiler's refusal, and the largest batch below it."""
    config = small_tokenizer(batch_size=4 * 1024, resolution=128)
    planner = Planner(PLANNER.topology, cache=tmp_path, wanted=("generator",))
    plan, fits = planner.plan(config)
    (generator,) = plan["programs"]
    assert not fits and not generator["fits"]
    assert generator["memory"]["all"] > PLANNER.topology.chip.memory
    assert "does not fit" in capsys.readouterr().out


def test_the_largest_batch(monkeypatch):
    """The search alone: what fits is said by a rule here."""

    def found(_, config, training_only):
        assert training_only
        size = config.training.batch_size
        memory = {"all": 1e6 * size}
        return [figures.Figures("step", 4, size, True, 1.0, memory, size <= 150)]

    monkeypatch.setattr(Planner, "figures", found)
    config = PLANNER.with_largest_batch(small_tokenizer())
    assert 132 <= config.training.batch_size <= 150 and config.training.batch_size % 4 == 0


def test_no_batch_fits(monkeypatch):
    def found(*_, **__):
        return [figures.Figures("step", 4, 4, True, 1.0, {"all": 1e12}, False)]

    monkeypatch.setattr(Planner, "figures", found)
    with pytest.raises(ConfigError, match=r"config\.mesh\.fsdp"):
        PLANNER.with_largest_batch(small_tokenizer())


def plan(*arguments, **environment):
    command = [sys.executable, "-m", "vqgan_jax.plan", *map(str, arguments)]
    return programs.run(
        command,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT), "XLA_FLAGS": ""} | environment,
        timeout=runs.TIMEOUT,
        cwd=runs.ROOT,
    )


@pytest.mark.slow
def test_the_command(quick_compiler, tmp_path):
    """A transformer over a tokenizer that nobody has trained; exit code 1 where it is large."""
    arguments = (
        "--config=configs/vim.py:earth",
        "--config.condition.num_classes=17",
        "--config.model.unroll=1",
        "--tokenizer_config=configs/vit_earth.py",
        "--topology=v5e:2x2",
        f"--cache={tmp_path}/cache",
        f"--json={tmp_path}/plan.json",
    )
    done = plan(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (written,) = json.loads((tmp_path / "plan.json").read_text())
    names = [program["name"] for program in written["programs"]]
    assert names == ["transformer step", "sampling step", "tokenising"]
    assert written["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1, "spatial": 1}

    explained = plan(*arguments, "--explain_sharding", "--config.mesh.fsdp=4")
    assert explained.returncode == 0
    assert "params/head/kernel" in explained.stdout and "fsdp" in explained.stdout

    large = plan(*arguments, "--batch_size=2000000", "--programs=transformer")
    assert large.returncode == 1
    assert "does not fit" in large.stdout and "Traceback" not in large.stderr


def test_bad_input_is_one_line(tmp_path):
    done = plan("--config=configs/vqgan_f16.py", "--topology=v5e:5x5", f"--cache={tmp_path}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --topology=v5e:5x5 is no slice")


def of_classes():
    config = small_transformer()
    config.condition.kinds = ("class",)
    return config


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: PLANNER.plan(small_tokenizer(batch_size=6)), "which 4 data-parallel"),
        (lambda: PLANNER.plan(small_transformer()), "--tokenizer_config="),
        (
            lambda: Planner(PLANNER.topology, wanted=("sampling",)).plan(small_tokenizer()),
            "names none of generator step, discriminator step, tokenising.",
        ),
        (
            lambda: Planner(PLANNER.topology, small_tokenizer()).plan(of_classes()),
            "--config.condition.num_classes=1000",
        ),
        (lambda: read_config(f"{runs.ROOT}/configs/vim.py:base"), "is the config of a transformer"),
    ],
)
def test_what_cannot_be_planned(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
