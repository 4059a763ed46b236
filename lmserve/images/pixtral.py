"""Pixtral's processor where torchvision is not installed.

transformers' class of this name cannot be imported then, although nothing that a picture needs asks for it. This one
has the same fields and writes the same text, over the same image processor for Pillow.
"""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin


class PixtralProcessor(ProcessorMixin):  # the name decides in ``from_pretrained`` which tokenizer is read
    """Rows of patches as rows of tokens, each with a token at its end."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **_: Any,
    ) -> None:
        start: Any = super().__init__  # transformers' own is not typed
        start(image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.image_break_token, self.image_end_token = image_token, image_break_token, image_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self._patch = patch_size * spatial_merge_size

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """What stands for an image of the size that the image processor has made of it."""
        height, width = image_inputs["image_sizes"][image_idx]
        rows, columns = int(height) // self._patch, int(width) // self._patch
        row = self.image_token * columns
        return self.image_break_token.join([row] * rows) + self.image_end_token

    def _process_images(self, images: Any, **options: Any) -> Any:
        return super()._process_images(images, **{**options, "patch_size": self._patch})
