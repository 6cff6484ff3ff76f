"""Text to image in every family: faces, and with them a control image and a second pass for small faces."""

from collections.abc import Sequence
from typing import Any

from diffusers import ControlNetModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image

from .control_pictures import ControlKind, DepthEstimator
from .face_fusion_mixin import FaceFusionMixin


def one_controlnet(controlnet: Any) -> Any:
    """A ControlNet, several as one, or None, of what a pipeline is given as `controlnet`."""
    if not isinstance(controlnet, (list, tuple)):
        return controlnet
    nets = [net for net in controlnet if isinstance(net, ControlNetModel)]  # from_pipe gives (None, None) for none
    return MultiControlNetModel(nets) if nets else None


class TextToImageFaces(FaceFusionMixin):
    """Faces for a text-to-image pipeline with an optional component `controlnet`.

    A class of it says by which pipelines of its family it draws with a control image, and a face again.

    `face_model` may be set to the face model that calls with `control_kind="landmarks"` use, see `face_models`.
    """

    face_model: Any = None

    def _control_class(self) -> type:
        """The family's ControlNet pipeline; imported here, for diffusers' is slow to import."""
        raise NotImplementedError

    def _image_to_image_class(self) -> type:
        """The family's image-to-image pipeline; imported here, as few calls need it."""
        raise NotImplementedError

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        control_image: Any = None,
        control_kind: ControlKind | Sequence[ControlKind] = "auto",
        depth_estimator: str | DepthEstimator = "auto",
        control_source: Any = None,
        face_model: Any = None,
        driver_image: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Text to image with people's faces, as [`FaceFusionMixin.__call__`]; and with the depth or pose of a picture.

        Args:
            prompt, args, kwargs: those of the pipeline of diffusers and of [`FaceFusionMixin.__call__`].
            control_image: depth map (near is white) or photo that sets the pose, for the `controlnet`; a list with
                one for each prompt, or of several ControlNets with one for each; see
                `pipeline_controlnet.call_with_control`. Then the arguments of diffusers' ControlNet pipeline are
                known too, `controlnet_conditioning_scale`, `control_guidance_start` and so on, and
                `control_face_scale`: the ControlNet's strength inside the face boxes.
            control_kind: `"depth"`, `"photo"` (its depth is estimated), `"map"` (of any other ControlNet, taken as it
                is), `"landmarks"` (a driver: the dots of the people's own shapes with its expressions and poses, see
                `control_landmarks.landmark_control`), or `"auto"`: without colour depth, with colour a photo. With
                several ControlNets a list, one each; `"auto"` refuses colour there.
            depth_estimator: see `control_pictures.load_depth_estimator`.
            control_source: whose shapes the dots have, photos or `FaceFit`s nested as `face_image` is; by default
                those of the photos of `face_image`, and without faces the driver's own.
            face_model: see `face_models.load_face_model`; by default `pipe.face_model`, if that was set.
            driver_image: for the ControlNet of `load_face_snap`: what a control image of the kind `"landmarks"` may
                be. With a `control_image` both are seen; the arguments of ControlNets then are lists, FaceSnap's last.
        """
        if control_image is None and driver_image is None:
            return super().__call__(prompt, *args, **kwargs)
        if args:
            raise TypeError("with control_image or driver_image all arguments after the prompt have to be named")
        from .pipeline_controlnet import call_with_control  # here: diffusers' ControlNet pipeline is slow to import

        return call_with_control(
            *(self, self._control_class(), prompt, control_image, control_kind, depth_estimator),
            **{"control_source": control_source, "face_model": face_model, "driver_image": driver_image, **kwargs},
        )

    def refine_faces(
        self,
        image: Any,
        prompt: str | Sequence[str],
        *,
        face_image: Any,
        face_boxes: Any = None,
        face_detector: Any = "auto",
        strength: float | None = None,
        max_face: float | None = None,
        **kwargs: Any,
    ) -> list[Image.Image]:
        """Draw the small faces of finished pictures again, larger, and put them back; the rest stays as it is.

        Where a face is small the model has few latent cells for it and its likeness suffers. Faces that would hardly
        be enlarged are left as they are.

        Args:
            image: a picture or a list of pictures, such as `images` of a result.
            prompt: of one person, "a smiling person in a suit", for all people or one for each: only this person is
                to be seen in what is drawn again.
            face_image: the people, as in the call: one person, or `[ada, bob]`; one level deeper, for each picture
                its own.
            face_boxes: XYXY of each person's face in pixels of the picture, or such a list for each picture, such as
                `face_boxes` of a result. Default: the faces that are found, people from left to right.
            face_detector: see `face_detectors.load_detector`.
            strength: fraction of the steps that is done again: how far a face may depart from the first drawing.
                Default: more for smaller faces, from .48 to .8, see `face_refinement.strength_for`.
            max_face: pixels of the picture: a face whose longer side is above stays as it is. Default: those that
                would be enlarged less than 1.25 times, above 234 pixels with a model of 512.
            kwargs: of diffusers' image-to-image and [`FaceFusionMixin.__call__`], such as
                `num_inference_steps` and `guidance_scale`; `generator`, `negative_prompt` and `face_scale` may be
                lists with one for each person.

        Returns:
            The pictures, in their size.

        Raises:
            FaceFusionError: a subclass for each kind of bad input.
        """
        from .face_refinement import refine_faces  # here: it brings another pipeline of diffusers

        return refine_faces(self, image, prompt, face_image, face_boxes, face_detector, strength, max_face, **kwargs)
