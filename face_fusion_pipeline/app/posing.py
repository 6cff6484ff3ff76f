"""Pose and expression of one person, of another photo or by numbers: facial points that FaceSnap's network sees."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ..control_landmarks import driven_faces, shape_of
from ..face_detectors import FaceDetector
from ..face_errors import FaceFusionError, NoFaceError
from ..face_images import crop_face
from ..face_landmarks import draw_landmarks
from ..face_layout import Box, assign_boxes
from ..face_models import FaceFit, FaceModel
from ..face_snap import networks_of
from ..generation.references import reference_crops
from .form import FieldError, Form, in_field
from .people import PeopleEngine


DOT = 0.012  # radius of a point on the page, in heights of the face


@dataclass(frozen=True, repr=False)
class Posed:
    """The person in the pose that was asked for.

    Attributes:
        points: (72, 2) in pixels of the pictures, see `face_landmarks`.
        crops: of the person's photos.
    """

    points: np.ndarray
    crops: list[Image.Image]

    def faces(self, mode: str) -> dict[str, Any]:
        """Arguments of a pipeline's call: photos, where an identity would not tell FaceSnap's network who it is.

        Args:
            mode: of that identity, so that photos join the picture in the same way.
        """
        return {"face_image": [self.crops], "face_mode": mode, "identity_by": "face-fusion"}


class PosingEngine(PeopleEngine):
    """A pipeline that can give a person the pose of another photo, where FaceSnap and a face model are loaded."""

    def __init__(self, pipe: Any, detector: FaceDetector | None = None) -> None:
        super().__init__(pipe, detector)
        self._fitting = threading.Lock()  # a finder of facial points keeps state while it looks

    @property
    def expressions(self) -> Sequence[str] | None:
        """Those that can be asked for; None: no pose can, for there are no FaceSnap weights or no face model."""
        model = self.pipe.face_model
        if self.pipe.face_snap_network is None or model is None:
            return None
        return ("neutral", *model.expressions)

    @property
    def has_control(self) -> bool:
        """Whether the model can follow the depth of a picture; FaceSnap's network sees facial points alone."""
        return bool(self._other_networks())

    def _other_networks(self) -> list[Any]:
        own = self.pipe.face_snap_network
        return [net for net in networks_of(self.pipe.controlnet) if net is not own]

    def fit_driver(self, picture: Image.Image, name: str) -> FaceFit:
        """The largest face in the picture of a file, whose pose and expression are to be taken.

        Raises:
            FieldError: there is none, or none that can be fitted; with the file's `name`.
        """
        try:
            return self._fit(picture)
        except FaceFusionError as error:
            raise FieldError("driver", f"{name}: {error}") from error

    def with_points(self, picture: Image.Image, fit: FaceFit) -> Image.Image:
        """The face that [`fit_driver`] found, with what was read of it: its points."""
        model, box = self._face_model, fit.box or (0, 0, *picture.size)
        points = model.points(fit.shape, fit.expression, fit.pose)
        dots = draw_landmarks(points, picture.size, radius=(box[3] - box[1]) * DOT)
        covered = dots.convert("L").point(lambda value: 255 * (value > 0))
        return crop_face(Image.composite(dots, picture, covered), box)

    @property
    def _face_model(self) -> FaceModel:
        if self.expressions is None:
            way_out = "start the app with --face-snap, and for photographs with --face-model and --landmarker"
            raise FieldError("driver", f"this app has no weights, or no face model, to follow a pose: {way_out}")
        model: FaceModel = self.pipe.face_model
        return model

    def _fit(self, picture: Image.Image, box: Box | None = None) -> FaceFit:
        model = self._face_model
        if box is None:
            found = self.find_boxes(picture)
            if not found:
                raise NoFaceError("no face found in it: take a photo that shows one larger, sharper or more frontal")
            (box,) = assign_boxes(found, 1)
        with self._fitting:
            return model.fit(picture, box)

    def posed(self, form: Form, size: tuple[int, int], boxes: Sequence[Box] | None) -> Posed | None:
        """The only person of a form in the pose that it asks for; None: it asks for none.

        Args:
            size: (width, height) of the pictures in pixels.
            boxes: of the person's face in pixels of them. None: where the face is in the photo of the pose, or without
                one in the person's own.

        Raises:
            FieldError: no photo shows the shape of the person's face, or the face comes to lie outside the pictures.
        """
        if not form.pose.is_given:
            return None
        (person,), pose, model = form.people, form.pose, self._face_model
        crops, fits, bad = [], [], []
        for photo in self.photos(person):
            crops += reference_crops(self.pipe, [photo])
            try:
                fits.append(self._fit(photo.image, None if photo.face is None else photo.face.box))
            except FaceFusionError as error:
                bad.append(error)
        if not fits:
            raise FieldError(person.field, f"a pose needs the shape of the face: {bad[0]}") from bad[0]
        turned = pose.turned or (None, None, None)
        place = partial(driven_faces, boxes=boxes, size=size, turned=turned, expression=pose.expression)
        driven = in_field("driver", place, model, [shape_of(model, fits)], pose.driver, self.find_boxes)
        return Posed(driven.points[0, :, :2], crops)

    def control_of(self, form: Form, posed: Posed | None) -> dict[str, Any]:
        """Arguments of a pipeline's call: the depth and the pose that are followed."""
        depth = {} if form.control is None else {"control_image": form.control}
        if posed is None:
            return depth
        strength: Any = float(form.pose.strength)  # a slider may say 1, which diffusers refuses
        if depth:  # one for each network, FaceSnap's last
            strength = [1.0] * len(self._other_networks()) + [strength]
        return {**depth, "driver_image": posed.points, "controlnet_conditioning_scale": strength}
