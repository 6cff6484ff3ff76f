"""Prompts × people × references: what each nesting means, and that nothing else is accepted."""

import pytest
import torch
from tiny_models import face

from face_fusion_pipeline.face_errors import FaceAxesError
from face_fusion_pipeline.face_identity import FaceIdentity
from face_fusion_pipeline.face_people import depth, describe, face_axes, per_person


IDENTITY = FaceIdentity({"x": torch.zeros(1, 2, 3)}, {"x": torch.zeros(1, 2, 3)}, torch.ones(1), "adapter")
A, B = face(0), face(1)


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (A, [1]),
        (IDENTITY, [1]),
        ([A, B], [1]),
        (torch.zeros(3, 3, 8, 8), [1]),
        ([[A], [B, B]], [2]),
        ([IDENTITY, [A, B]], [2]),
        ([IDENTITY, IDENTITY, IDENTITY], [3]),
        ([torch.zeros(2, 3, 8, 8), [A]], [2]),
        ([[[A]], [[A], [B]]], [1, 2]),
        ([[IDENTITY], [IDENTITY]], [1, 1]),
    ],
)
def test_nesting_names_the_axes(given, shape):
    assert [len(people) for people in face_axes(given, len(shape))] == shape


def test_references_of_one_person_stay_together():
    assert face_axes([A, B], 1) == [[[A, B]]]
    assert face_axes([[A], [B, A]], 5) == [[[A], [B, A]]]


@pytest.mark.parametrize(
    ("given", "prompts", "message"),
    [
        ([A, [B]], 1, r"mixes levels in \[image, \[image\]\]"),
        ([[A], IDENTITY, B], 1, "mixes levels"),
        ([], 1, "empty list"),
        ([[A], []], 1, "empty list"),
        ([[[A]], [[B]]], 3, r"people for 2 prompts, but there are 3.*\[\[\[image\]\], \[\[image\]\]\]"),
        ([[[[A]]]], 1, "nested 4 deep"),
    ],
)
def test_anything_else_is_refused(given, prompts, message):
    with pytest.raises(FaceAxesError, match=message):
        face_axes(given, prompts)


def test_values_for_people_are_broadcast_or_one_to_one():
    casts = [[A, B], [A, B]]
    assert per_person(0.5, casts, "face_scale") == [[0.5, 0.5], [0.5, 0.5]]
    assert per_person([0.5, 1], casts, "face_scale") == [[0.5, 1], [0.5, 1]]
    with pytest.raises(FaceAxesError, match="3 values of face_scale for 2 people"):
        per_person([1, 2, 3], casts, "face_scale")


def test_depth_and_description():
    assert [depth(x) for x in (A, [A], [[A]], IDENTITY)] == [0, 1, 2, 1]
    assert describe([[A], IDENTITY]) == "[[image], identity]"
