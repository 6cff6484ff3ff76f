"""The benchmark harness at a tiny size: what it counts, pairs and writes, not how fast anything is."""

import csv
import json
import mmap
import time
import types
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import added, measure, regions, report, training
from benchmarks.__main__ import PAGE, main, parse
from benchmarks.floor import STEPS, arithmetic, count_flops, floor_ratio
from benchmarks.measure import Job, Result, Setup, Timing, counted, slope, timed
from benchmarks.regions import Layer, added_bytes, measure_layer, region_row
from benchmarks.shapes import SHAPES, Model, twin
from benchmarks.variants import comparison, growth, plain
from face_fusion_pipeline.face_attention import FaceFusionAttnProcessor, attention_layers


TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def model():
    return Model(TINY)


@pytest.fixture(scope="module", params=["tiny", "tiny-xl"])
def either(request):
    return Model(SHAPES[request.param])


def result(label, *images):
    variant = next(variant for variant in comparison(TINY) if variant.label == label)
    return Result(Setup("tiny"), variant, [Timing(step=0.0, once=image) for image in images])


def test_attention_is_counted_on_the_cpu_as_on_the_meta_device():
    for device in ("cpu", "meta"):
        query, key = torch.empty(2, 3, 16, 8, device=device), torch.empty(2, 3, 24, 8, device=device)
        counts = count_flops(lambda q=query, k=key: F.scaled_dot_product_attention(q, k, k))
        assert counts == 2 * 3 * 4 * 16 * 24 * 8


def test_floor_of_stable_diffusion_agrees_with_arithmetic_by_hand():
    parts = arithmetic("sd15", itemsize=2)
    tokens_and_widths = [(4096, 320)] * 5 + [(1024, 640)] * 5 + [(256, 1280)] * 5 + [(64, 1280)]
    by_hand = sum(4 * n * n * width for n, width in tokens_and_widths)
    assert parts.attention(512, 512).flops == by_hand
    assert parts.attention(512, 512).bytes == 2 * 2 * sum(n * width for n, width in tokens_and_widths)
    assert parts.attention(512, 256).flops == by_hand / 4
    reference = parts.reference(512)
    assert reference["face keys and values"].flops == sum(4 * n * width**2 for n, width in tokens_and_widths)
    assert (
        0.95 < reference["UNet, one row"].flops / (parts.plain(512, 1)[1].flops / 2) < 1
    )  # it may end a little early


def test_floor_of_stable_diffusion_xl_agrees_with_arithmetic_by_hand():
    """Ten layers a block where cells are 1280 wide, two where they are 640: 70 in all, none at the finest size."""
    parts = arithmetic("sdxl", itemsize=2)
    tokens_and_widths = [(4096, 640)] * 10 + [(1024, 1280)] * 60
    by_hand = sum(4 * n * n * width for n, width in tokens_and_widths)
    assert parts.attention(1024, 1024).flops == by_hand
    assert parts.attention(1024, 512).flops == by_hand / 4
    assert sum(weight.numel() for weight in parts.unet.parameters()) == 2_567_463_684  # as published
    reference = parts.reference(1024)
    assert reference["face keys and values"].flops == sum(4 * n * width**2 for n, width in tokens_and_widths)
    assert 0.9 < reference["UNet, one row"].flops / (parts.plain(1024, 1)[1].flops / 2) < 1


def test_every_variant_runs_and_none_of_ours_goes_below_its_floor(either):
    flops, model, shape = {}, either, either.shape
    for variant in comparison(shape):
        flops[variant.label] = counted(variant.build(model)).flops
        if variant.use is not None:
            ratio, floor = flops[variant.label] / flops["plain"], floor_ratio(shape.name, variant.use)
            assert floor - 1e-3 < ratio < floor + 0.01, variant.label
    assert flops["plain, again"] == flops["plain"]
    assert flops["reference pipeline"] > 2 * flops["plain"]
    assert flops["saved identity, 8 px"] < flops["1 reference, 8 px"] < flops["1 reference, 16 px"]
    assert flops["plain"] < flops["ControlNet"] < flops["ControlNet, 1 reference, 8 px"]


def test_every_point_of_a_sweep_has_its_base():
    for name, variants in growth(TINY).items():
        labels = [variant.label for variant in variants]
        assert len(set(labels)) == len(labels), name
        assert {variant.against for variant in variants} <= set(labels), name
    assert growth(SHAPES["sd15"])["output px"][-1].label == "1024"


def test_pipelines_share_weights_but_not_processors(model):
    copy = twin(model.unet)
    pairs = zip(copy.parameters(), model.unet.parameters(), strict=True)
    assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in pairs)
    processors = zip(copy.attn_processors.values(), model.unet.attn_processors.values(), strict=True)
    assert all(mine is not theirs for mine, theirs in processors)


def test_a_whole_image_is_extrapolated_from_its_steps(monkeypatch):
    now = iter([100.0, 103.0, 105.0, 107.0, 108.0])  # start, three steps (the first one slow), end
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))

    def call(num_inference_steps, callback_on_step_end):
        for step in range(num_inference_steps):
            callback_on_step_end(None, step, None, {})

    timing = timed(Job(None, call), Setup("tiny", steps=3))
    assert timing == Timing(step=2.0, once=2.0)  # 8 s in all
    assert timing.image == 2.0 + STEPS * 2.0


@pytest.fixture
def wait(monkeypatch):
    """What lets time pass: nothing else does, however busy the machine is."""
    now = [0.0]
    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_decoding_is_timed_once_for_each_size(model, monkeypatch, wait):
    decoded = []
    decoder = measure.Decoder(types.SimpleNamespace(decode=lambda x: (decoded.append(x.shape), wait(0.2))), None)
    decoder.setup = Setup("tiny", steps=2)
    job = plain(model)
    monkeypatch.setattr(job.pipe.vae, "decode", lambda *args, **kwargs: pytest.fail("the call itself decodes"))
    assert timed(job, decoder.setup, decoder).once == pytest.approx(0.2)
    assert timed(job, decoder.setup, decoder).once == pytest.approx(0.2) and len(decoded) == 1
    decoder.forget()
    timed(job, decoder.setup, decoder)
    assert decoded == [(1, 4, 8, 8)] * 2
    monkeypatch.undo()
    assert counted(job, measure.Decoder(job.pipe.vae, decoder.setup)).flops == counted(job).flops


def test_training_is_timed_beside_a_bare_pass(monkeypatch, wait):
    real, forward = training.bare_step, training.FaceFusionTask.forward
    monkeypatch.setattr(training, "bare_step", lambda *args: (wait(0.3), real(*args)))
    monkeypatch.setattr(training.FaceFusionTask, "forward", lambda *args: (wait(0.1), forward(*args))[1])
    setup = Setup("tiny", steps=2)
    found = training.measure_training(setup, reference=8, batch=3, steps=2, rounds=2)
    assert [one.bare for one in found] == pytest.approx([0.3] * 2)
    assert [one.training for one in found] == pytest.approx([0.1] * 2, rel=0.01)
    assert all(one.memory > 2**20 for one in found)
    found = [training.Round(1.0, 2.0, 2**30, 2**31), training.Round(3.0, 4.0, 2**30, 2**30)]
    text = training.training_table(setup, 8, 3, found)
    assert (
        "| bare forward and backward | 2 | 1.5 | 1.00 |" in text and "| Face Fusion training | 3 | 1 | 2.00 |" in text
    )
    assert "0.625 [0.500, 0.750] of the bare" in text and "22.2 hours" in text  # 80,000 / 3 x 3 s


def test_the_peak_of_memory_can_be_forgotten():
    setup = Setup("tiny")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("here a process cannot forget its peak")
    block = mmap.mmap(-1, 2**28)
    block.write(b"x" * 2**28)
    high = measure.device_bytes(setup, peak=True)
    block.close()
    measure.forget_peak(setup)
    assert measure.device_bytes(setup, peak=True) < high - 2**27


def test_ratios_are_taken_within_a_round():
    base, other = result("plain", 1.0, 10.0, 2.0), result("reference pipeline", 2.0, 20.0, 5.0)
    assert other.ratios(base, "image") == [2.0, 2.0, 2.5]
    assert report.ratio(other.ratios(base, "image")) == "2.000 [2.000, 2.500]"


def faces_cost(monkeypatch, wait, each):
    """Every attention to a face takes `each` seconds longer; nothing else does."""
    attend = FaceFusionAttnProcessor._attend_people

    def slowly(self, attn, query, key, value, mask, people):
        if people:
            wait(each)
        return attend(self, attn, query, key, value, mask, people)

    monkeypatch.setattr(FaceFusionAttnProcessor, "_attend_people", slowly)


def test_what_a_face_adds_is_found_in_the_layers_and_before_the_loop(model, monkeypatch, wait):
    variants = {variant.label: variant for variant in comparison(TINY)}
    setup = Setup("tiny", steps=2)
    job, saved = (variants[label].build(model) for label in ("1 reference, 8 px", "saved identity, 8 px"))
    layers = len(attention_layers(job.pipe.unet, "attn2"))
    faces_cost(monkeypatch, wait, 0.02)
    for layer in attention_layers(job.pipe.unet, "attn2").values():  # what takes time with and without a face cancels
        layer.to_q.register_forward_hook(lambda *_: wait(0.03))
    encode = job.pipe.vae.encode
    monkeypatch.setattr(job.pipe.vae, "encode", lambda *args, **kwargs: (wait(0.5), encode(*args, **kwargs))[1])
    found = added.added_by(job, setup, plain=(10.0, 0.0))
    assert found.before == pytest.approx(0.5 + 0.03 * layers), "the reference passes through the UNet"
    assert found.attention.keys() == {64, 16} and found.step == pytest.approx(0.02 * layers)
    assert found.ratio == pytest.approx(1 + (found.before + STEPS * found.step) / found.plain)
    assert found.plain == pytest.approx(10 + STEPS * 0.03 * layers), "the step it is compared with sees no face"
    assert added.added_by(saved, setup, plain=(10.0, 0.0)).before == pytest.approx(0), "nothing is encoded"


def test_a_picture_is_the_same_while_its_layers_are_timed(model):
    for label in ("1 reference, 8 px", "2 people, 8 px", "training-free, 8 px"):
        job = next(variant for variant in comparison(TINY) if variant.label == label).build(model)
        pictures = []
        for watch in (False, True):
            if isinstance(job.call, partial):
                job.call.keywords["generator"].manual_seed(0)
            with added.layers_timed(job.pipe.unet, Setup("tiny")) if watch else nullcontext({}) as seconds:
                pictures.append(job.call(num_inference_steps=2, output_type="np").images)
        assert seconds, label
        assert all("forward" not in vars(layer) for layer in attention_layers(job.pipe.unet, "attn2").values())
        if isinstance(job.call, partial):  # elsewhere the noise goes on from call to call
            assert (pictures[0] == pictures[1]).all(), label


def test_added_writes_its_table_and_rounds(tmp_path, capsys):
    labels = ["1 reference, 8 px", "saved identity, 8 px"]
    main(["added", "--shape", "tiny", "--rounds", "2", "--out", str(tmp_path), "--variants", *labels])
    table = capsys.readouterr().out
    assert all(f"| {label} |" in table for label in labels) and "3 references" not in table
    with (tmp_path / "added-tiny-cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2  # variants, rounds, sizes of layers
    assert {row["queries"] for row in rows} == {"64", "16"}
    points = ["references: 8", "people: 2", "reference px: 16"]
    main(["added", "--shape", "tiny", "--grow", "--rounds", "1", "--out", str(tmp_path), "--variants", *points])
    table = capsys.readouterr().out
    assert all(f"| {label} |" in table for label in points) and "people: 3" not in table
    with pytest.raises(SystemExit, match="compile"):
        main(["added", "--shape", "tiny", "--compile", "inductor", "--out", str(tmp_path)])


def test_resident_memory_is_seen_to_grow():
    before = measure.resident_bytes()
    # Straight from the system: an allocator may hand out pages that it had kept from earlier tests.
    with mmap.mmap(-1, 2**26) as memory:
        memory.write(b"x" * 2**26)
        assert measure.resident_bytes() - before > 2**25
    assert measure.resident_bytes(peak=True) >= before + 2**25


def test_leaks_are_told_from_warming_up():
    assert slope([0, 50, 90, 100, 100, 100, 100, 100]) == 0
    assert slope([3.0 * call for call in range(10)]) == pytest.approx(3.0)


def test_a_variant_that_fails_is_reported_and_the_others_measured():
    broken = comparison(TINY)[2]
    broken = type(broken)("broken", lambda model: 1 / 0)
    said = []
    results = measure.measure(Setup("tiny", steps=2, threads=1), [comparison(TINY)[0], broken], 1, said.append)
    assert [len(one.timings) for one in results] == [1, 0]
    assert results[1].skipped == "ZeroDivisionError: division by zero" and "broken" in said[0]
    assert "* Not run: broken: ZeroDivisionError" in report.comparison_table(results)


def test_compare_writes_table_csv_and_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin compare tiny cpu -->\nold\n<!-- end compare tiny cpu -->\nafter\n")
    options = ["--shape", "tiny", "--rounds", "2", "--threads", "1", "--out", str(tmp_path), "--page", str(page)]
    main(["compare", *options, "--no-alone", "--variants", "1 reference, 8 px"])
    rows = list(csv.DictReader((tmp_path / "compare-tiny-cpu.csv").open()))
    assert [row["variant"] for row in rows] == ["plain"] * 2 + ["1 reference, 8 px"] * 2
    assert all(float(row["image_s"]) > 0 for row in rows)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 1 reference, 8 px |" in text and "| 1 reference, 8 px |" in capsys.readouterr().out


def test_first_image_and_memory_are_printed_for_the_parent(tmp_path, capsys):
    main(["alone", "--shape", "tiny", "--threads", "1", "--label", "plain", "--out", str(tmp_path)])
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["first"] > 0 and measured["memory"] > 2**20


def test_graphs_are_counted():
    try:
        with measure.graphs_counted() as graphs:
            double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
            assert [graphs() for n in (1, 1, 2, 1) if double(torch.ones(n)).sum()] == [1, 1, 2, 2]
    finally:
        torch._dynamo.reset()


def test_a_long_run_reports_memory_and_recompilation(tmp_path):
    main(["soak", "--shape", "tiny", "--calls", "4", "--threads", "1", "--out", str(tmp_path)])
    table = (tmp_path / "soak-tiny-cpu.md").read_text()
    assert "| graphs compiled after that | 0 |" in table and "| growth a call over the second half, KiB |" in table


def test_page_has_a_place_for_every_result():
    page = PAGE.read_text()
    names = [
        "floor sd15",
        "floor avatar",
        "floor sdxl",
        "compare sdxl cpu",
        "compare sd15 cpu",
        "compare avatar cpu",
        "compare sd15 cuda",
    ]
    names += ["added sd15 cpu", "added sd15 grow cpu", "grow avatar cpu", "grow sd15 cuda", "profile sd15 cuda"]
    names += [
        "load sd15",
        "soak avatar cpu",
        "soak sd15 cuda",
        "compare sd15 cuda compiled",
        "compare sd15 cuda attention",
    ]
    for name in names:
        assert f"<!-- begin {name} -->\n" in page and f"<!-- end {name} -->" in page, name
    with pytest.raises(ValueError, match="begin other"):
        report.fill(PAGE, "other", "")


def test_one_step_cannot_be_timed():
    with pytest.raises(SystemExit):
        parse(["compare", "--steps", "1"])


def test_jobs_of_one_model_are_independent(model):
    first, second = plain(model), plain(model)
    assert first.pipe.unet is not second.pipe.unet and first.pipe.scheduler is not second.pipe.scheduler


@pytest.mark.parametrize("people", [2, 3])
def test_grouped_queries_and_the_dense_mask_agree(people):
    layer = Layer.create(people, tokens=9, setup=Setup("tiny", dtype="float64"), side=16)
    assert len(layer.regions.parts) == people + 1  # and the background
    torch.testing.assert_close(layer.grouped(), layer.dense(), rtol=1e-10, atol=1e-12)


def test_table_of_regions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.REGION_CASES", [(2, 16)])
    main(["regions", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)])
    row = capsys.readouterr().out.splitlines()[2].split("|")[1:-1]
    assert [cell.strip() for cell in row[:2]] == ["2", "16"]
    grouped, dense, over = (float(cell.split()[0]) for cell in row[2:5])
    assert over == pytest.approx(dense / grouped, rel=0.2)


def test_the_first_round_of_both_ways_warms_up(monkeypatch):
    now, seconds = [0.0], iter([50.0, 70.0, 1.0, 2.0, 3.0, 4.0])  # the first calls are slow

    def call(layer):
        now[0] += next(seconds)

    monkeypatch.setattr(Layer, "grouped", call)
    monkeypatch.setattr(Layer, "dense", call)
    monkeypatch.setattr(regions.time, "perf_counter", lambda: now[0])
    layer = Layer.create(2, tokens=4, setup=Setup("tiny"), side=8)
    assert measure_layer(layer, Setup("tiny"), rounds=2) == {"grouped": [1.0, 3.0], "dense": [2.0, 4.0]}


@pytest.mark.parametrize("way", ["grouped", "dense"])
def test_added_memory_is_that_of_one_call(way, monkeypatch):
    called = []
    for name in ("grouped", "dense"):
        monkeypatch.setattr(Layer, name, lambda layer, name=name: called.append(name))
    monkeypatch.setattr(regions, "device_bytes", lambda setup, peak=False: 350 if peak and called else 100)
    assert added_bytes(2, 4, way, Setup("tiny")) == 250 and called == [way]


def test_a_row_of_regions_is_in_milliseconds_and_mebibytes():
    times = {"grouped": [0.001, 0.002, 0.009], "dense": [0.002, 0.006, 0.009]}
    row = region_row(3, 16, times, {"grouped": 2**20, "dense": 5 * 2**20})
    assert row == [3, 16, "2.0", "6.0", "2.000 [1.000, 3.000]", "1", "5"]
