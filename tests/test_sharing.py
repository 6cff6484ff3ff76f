"""One UNet in several hands: other threads, other pipelines, callbacks. Identities never mix, and nobody waits."""

import asyncio
import sys
import threading

import pytest
import torch
from diffusers import StableDiffusionPipeline
from test_pipeline import load_random_ip_adapter
from test_several_people import LEFT, RIGHT, FakeDetector, close, differ
from tiny_models import face, generate, in_mode, tiny_components, tiny_pipeline, with_adapter

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline, face_ownership
from face_fusion_pipeline.face_defaults import FACE_MODES
from face_fusion_pipeline.face_errors import FaceFusionError


A, B = face(0), face(1)
IN_USE = "in use by another call with faces"


@pytest.fixture
def pipe():
    return with_adapter(tiny_pipeline())


def another(pipe, kind=StableDiffusionFaceFusionPipeline):
    """A pipeline of its own with the UNet of `pipe`."""
    extra = {"image_encoder": None} if kind is StableDiffusionPipeline else {}
    other = kind(**tiny_components() | {"unet": pipe.unet}, **extra)
    other.set_progress_bar_config(disable=True)
    return other


def in_thread(work):
    """What `work()` returns or raises in another thread."""
    outcome = []

    def run():
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(120)
    return outcome[0]


def once_inside(unet, work):
    """Run `work()` in another thread as soon as the middle of `unet` is reached, and wait for it; its outcome."""
    outcome = []

    def hook(module, args):
        if not outcome:
            outcome.append(None)  # the other thread comes by here, too
            outcome[0] = in_thread(work)

    handle = unet.mid_block.register_forward_pre_hook(hook)
    return outcome, handle


def same_identity(one, other):
    return one.keys.keys() == other.keys.keys() and all(
        torch.equal(one.keys[name], other.keys[name]) and torch.equal(one.values[name], other.values[name])
        for name in one.keys
    )


def test_two_pipelines_share_a_unet_in_turn(pipe):
    other = with_adapter(another(pipe))
    first, second = generate(pipe, face_image=A), generate(other, face_image=B)
    assert close(generate(pipe, face_image=A), first)
    assert differ(first, second)


def test_two_threads_on_one_unet(pipe):
    """A second call with faces is refused, one without is not disturbed, and neither disturbs the first."""
    expected, plain = generate(pipe, face_image=A), generate(pipe)
    outcome = []

    def others(pipe, step, timestep, tensors):
        if step == 1:
            for kind, faces in (
                (StableDiffusionFaceFusionPipeline, {"face_image": B}),
                (StableDiffusionFaceFusionPipeline, {}),
                (StableDiffusionPipeline, {}),
            ):
                other = another(pipe, kind)
                outcome.append(in_thread(lambda other=other, faces=faces: generate(other, **faces)))
            outcome.append(in_thread(lambda: another(pipe).encode_face(B)))
        return tensors

    assert torch.equal(generate(pipe, face_image=A, callback_on_step_end=others), expected)
    refused, ours, stock, encoded = outcome
    for error in (refused, encoded):
        assert isinstance(error, FaceFusionError) and IN_USE in str(error)
    assert torch.equal(ours, plain) and torch.equal(stock, plain)
    assert torch.equal(generate(pipe, face_image=A), expected)


@pytest.mark.parametrize("mode", ["adapter", "training-free"])
@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionFaceFusionPipeline])
def test_a_plain_call_during_an_encode_changes_neither(pipe, kind, mode):
    expected, plain = pipe.encode_face(A, face_mode=mode), generate(pipe)
    before = dict(pipe.unet.attn_processors)
    other = another(pipe, kind)
    outcome, handle = once_inside(pipe.unet, lambda: generate(other))
    identity = pipe.encode_face(A, face_mode=mode)
    handle.remove()
    assert torch.equal(outcome[0], plain)
    assert same_identity(identity, expected)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


def test_a_plain_call_with_an_ip_adapter_during_an_encode_changes_neither(pipe):
    load_random_ip_adapter(pipe)
    ip = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))]}
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    ip["cross_attention_kwargs"] = {"ip_adapter_masks": [mask]}
    expected, plain = pipe.encode_face(A), generate(pipe, **ip)
    other = another(pipe)
    outcome, handle = once_inside(pipe.unet, lambda: generate(other, **ip))
    identity = pipe.encode_face(A)
    handle.remove()
    assert torch.equal(outcome[0], plain)
    assert same_identity(identity, expected)


def test_of_two_encodes_at_once_the_second_is_refused(pipe):
    expected = pipe.encode_face(A)
    other = with_adapter(another(pipe))
    outcome, handle = once_inside(pipe.unet, lambda: other.encode_face(B))
    identity = pipe.encode_face(A)
    handle.remove()
    assert isinstance(outcome[0], FaceFusionError) and IN_USE in str(outcome[0])
    assert same_identity(identity, expected)
    assert same_identity(other.encode_face(A), expected)  # free again


@pytest.mark.parametrize("mode", ["adapter", "training-free"])
@pytest.mark.parametrize("call", ["encode", "faces", "plain"])
def test_a_callback_cannot_start_what_would_see_the_faces(pipe, call, mode):
    identity = pipe.encode_face(A)
    expected = generate(pipe, face_image=identity)
    before = dict(pipe.unet.attn_processors)
    refused = []

    def start(pipe, step, timestep, tensors):
        other = with_adapter(another(pipe))
        with pytest.raises(FaceFusionError, match=IN_USE) as error:
            if call == "encode":
                other.encode_face(B, face_mode=mode)
            else:
                generate(other, **({"face_image": B, "face_mode": mode} if call == "faces" else {}))
        refused.append(error)
        return tensors

    assert torch.equal(generate(pipe, face_image=identity, callback_on_step_end=start), expected)
    assert len(refused) == 3
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


def test_the_draft_belongs_to_the_call(pipe):
    """Between encoding and generating nobody else may begin."""

    class Intruder(FakeDetector):
        def detect(self, image):
            outcome.append(in_thread(lambda: other.encode_face(B)))
            return super().detect(image)

    outcome, other = [], another(pipe)
    generate(pipe, face_image=[[A], [B]], face_detector=Intruder(LEFT, RIGHT))
    assert outcome and all(isinstance(error, FaceFusionError) and IN_USE in str(error) for error in outcome)


def test_a_copy_of_the_module_is_recognised(pipe, monkeypatch):
    """diffusers' loader makes a copy of every module; what is in use is then seen by the processors."""
    refused = []

    def encode(pipe, step, timestep, tensors):
        with monkeypatch.context() as patch:
            patch.setattr(face_ownership, "_uses", [])
            for mode in ("adapter", "training-free"):
                with pytest.raises(FaceFusionError, match=IN_USE):
                    with_adapter(another(pipe)).encode_face(B, face_mode=mode)
                refused.append(mode)
        return tensors

    generate(pipe, face_image=A, callback_on_step_end=encode, num_inference_steps=1)
    assert refused == ["adapter", "training-free"]


def test_a_unet_is_free_after_an_error_and_is_not_kept_alive(pipe):
    with pytest.raises(FaceFusionError, match="multiple of 2"):
        pipe.encode_face(A, face_resolution=15)
    with pytest.raises(ValueError, match="num_inference_steps"):
        generate(pipe, face_image=A, num_inference_steps=10_000)
    pipe.encode_face(A)
    assert not list(face_ownership._uses)


def test_compiled_and_plain_wrappers_are_the_same_unet(pipe):
    compiled = torch.compile(pipe.unet, backend="eager")
    with face_ownership.sole_use(compiled), pytest.raises(FaceFusionError, match=IN_USE):
        pipe.encode_face(A)


def test_a_detector_is_loaded_once_for_all_pictures(pipe, monkeypatch):
    from test_several_people import LEFT, RIGHT, FakeDetector

    from face_fusion_pipeline import face_detectors

    loaded = []

    def load(name):
        loaded.append(name)
        return FakeDetector(LEFT, RIGHT)

    monkeypatch.setattr(face_detectors, "load_detector", load)
    for _ in range(2):
        generate(pipe, face_image=[[face(0)], [face(1)]], face_detector="haar")
    assert loaded == ["haar"]


# --- Interrupts ----------------------------------------------------------------------------------------------------


USES = {
    "installed_processors",
    "sole_use",
    "heal",
    "take_over",
    "installed",
    "_without_ip_adapter",
}


def interrupted_at(place, run):
    """Run to the `place`th line of these functions, and raise KeyboardInterrupt there; False where there is none."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        ours = frame.f_globals.get("__name__", "").startswith("face_fusion_pipeline.")
        if not ours or frame.f_code.co_name not in USES:
            return None
        if event == "line":
            count += 1
            if count == place:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        run()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)


def usable_elsewhere(unet):
    """Whether another thread may use a UNet now."""
    used = []

    def use():
        with face_ownership.sole_use(unet):
            used.append(True)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(20)
    return used == [True]


def test_whether_a_use_goes_on_is_not_asked_of_all_threads(pipe, monkeypatch):
    """`sys._current_frames` can stop for ever in Python 3.11 (https://github.com/python/cpython/issues/106883)."""
    monkeypatch.delattr(sys, "_current_frames")

    def use_in_vain():
        with pytest.raises(FaceFusionError, match=IN_USE), face_ownership.sole_use(pipe.unet):
            pass

    with face_ownership.sole_use(pipe.unet):
        use_in_vain()
        assert in_thread(use_in_vain) is None
    assert usable_elsewhere(pipe.unet)


def test_a_coroutine_that_waits_is_not_ended_by_the_next_use(pipe):
    async def waits():
        with face_ownership.sole_use(pipe.unet):
            await asyncio.sleep(0)
        return "done"

    async def both():
        waiting = asyncio.create_task(waits())
        await asyncio.sleep(0)
        usable_elsewhere(pipe.unet)
        return await waiting

    assert asyncio.run(both()) == "done"


@pytest.mark.parametrize("mode", FACE_MODES)
def test_an_interrupt_anywhere_leaves_a_unet_that_the_next_call_can_use(pipe, monkeypatch, mode):
    pipe = in_mode(pipe, mode, monkeypatch)
    settings = {"face_image": face(), "num_inference_steps": 1}
    expected, plain = generate(pipe, **settings), generate(pipe, num_inference_steps=1)
    processors = dict(pipe.unet.attn_processors)
    place = 1
    while interrupted_at(place, lambda: generate(pipe, **settings)):
        faces = place % 2 == 0
        after = generate(pipe, **settings) if faces else generate(pipe, num_inference_steps=1)
        assert torch.equal(after, expected if faces else plain), f"interrupted at line {place}"
        assert pipe.unet.attn_processors == processors
        assert usable_elsewhere(pipe.unet), f"interrupted at line {place}, the UNet is locked to other threads"
        place += 1 if place < 12 else 11
    assert place > 100
