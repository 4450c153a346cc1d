"""Image loading that names the file when it fails."""

from mmcv.transforms import LoadImageFromFile

from gplq_mm.registry import TRANSFORMS

from ..errors import DataError


@TRANSFORMS.register_module()
class LoadImageOrFail(LoadImageFromFile):
    """:class:`mmcv.transforms.LoadImageFromFile` that fails clearly on a bad file.

    The decoder is Pillow unless told otherwise: OpenCV fills the missing part of a truncated
    JPEG with grey and goes on, and a calibration on such an image would be silently wrong.

    Args:
        imdecode_backend (str): Defaults to ``'pillow'``.
        **kwargs: Further arguments of :class:`mmcv.transforms.LoadImageFromFile`, except
            ``ignore_empty``.
    """

    def __init__(self, imdecode_backend: str = 'pillow', **kwargs) -> None:
        super().__init__(imdecode_backend=imdecode_backend, ignore_empty=False, **kwargs)

    def transform(self, results: dict) -> dict:
        """Load ``results['img_path']``.

        Args:
            results (dict): Holds ``img_path``.

        Returns:
            dict: With ``img`` (uint8, shape (H, W, 3), BGR), ``img_shape`` and ``ori_shape``.

        Raises:
            DataError: If the file is missing, truncated or no image; names the file.
        """
        try:
            return super().transform(results)
        # Each decoder has its own errors: OSError, SyntaxError (broken PNG), AssertionError,
        # cv2.error, struct.error, Image.DecompressionBombError.
        except Exception as error:
            raise DataError(
                f'{results["img_path"]} cannot be read as an image ({error}): replace the file '
                'or take it out of the data set.'
            ) from error
