"""Stable Diffusion XL with references: encodes them once per call and hands them to the UNet."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from mip.errors import ConfigError
from mip.model.adapter import Arithmetic, MIPAdapter
from mip.model.checkpoint import find_adapter, read_adapter, save_adapter
from mip.model.encoding import Framing, encode_texts, image_pixels, name_tokens
from mip.model.maps import MeanRelevance, MIPAdapterXLPipelineOutput
from mip.model.projection import check_encoder
from mip.model.references import Merge, ReferenceCache, References
from mip.model.request import (
    Reference,
    oracle_masks,
    region_masks,
    rows_per_prompt,
    stacked,
    warn_of_absent_names,
)
from mip.model.window import Window

_PARENT_CALL = inspect.signature(StableDiffusionXLPipeline.__call__)
_SAVED = "mip_adapter.safetensors"
_PARENT_EXTRAS = {"callback", "callback_steps"}  # deprecated, but still read by the parent from its **kwargs


class MIPAdapterXLPipeline(StableDiffusionXLPipeline):
    """The parent pipeline plus `references=`. Without references it is the parent, bit for bit."""

    mip_adapter: MIPAdapter | None = None
    """The installed adapter."""

    def load_mip_adapter(
        self,
        source: str | Path,
        *,
        weight_name: str | None = None,
        image_encoder: CLIPVisionModelWithProjection | str | Path | None = None,
        image_encoder_subfolder: str = "",
        variant: str | None = None,
        arithmetic: Arithmetic = "fast",
    ) -> None:
        """Load adapter weights and the image encoder they need; replaces an adapter loaded before.

        Args:
            source: a file, a folder, or a repository on the Hugging Face hub.
            weight_name: file name inside the folder or repository.
            image_encoder: an encoder, a folder or a repository; None keeps the pipeline's own.
            image_encoder_subfolder: folder of the encoder inside its repository.
            variant: "sdxl" or "sdxl_plus", to insist on one; None takes what the file is.
            arithmetic: "official" computes attention in the public code's order of operations: slower, for comparison.

        Raises:
            CheckpointError: the file cannot be had or does not fit this UNet.
            ConfigError: no image encoder or a wrong one, or the UNet's weights are out of reach (sequential offload).
        """
        if self.unet.device.type == "meta":
            raise ConfigError(
                "got a UNet whose weights are offloaded; load the adapter before enabling sequential offload"
            )
        checkpoint = read_adapter(find_adapter(source, weight_name), variant=variant)
        adapter = MIPAdapter.from_checkpoint(checkpoint, self.unet)
        encoder = self._found_image_encoder(image_encoder, subfolder=image_encoder_subfolder)
        check_encoder(adapter.variant, adapter.projection, encoder)
        self.register_modules(image_encoder=encoder)
        # With offloading on, this sets the hooks anew, for the encoder too.
        self.maybe_free_model_hooks()
        self.unload_mip_adapter()
        self.mip_adapter = adapter.install(self.unet, dtype=self.unet.dtype, arithmetic=arithmetic)

    def unload_mip_adapter(self) -> None:
        """Restore the UNet as it was; does nothing when no adapter is loaded."""
        if self.mip_adapter is not None:
            self.mip_adapter.eject()
        self.mip_adapter = None

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As the parent's; the adapter lies in a file of its own beside the UNet, which is saved as it was without."""
        if self.mip_adapter is None:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        with self.mip_adapter.ejected():
            super().save_pretrained(save_directory, *args, **kwargs)
        save_adapter(Path(save_directory) / _SAVED, self.mip_adapter.checkpoint(self.mip_adapter.metadata))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Self:
        """As the parent's; an adapter that `save_pretrained` left in a local folder is loaded too."""
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        saved = Path(pretrained_model_name_or_path) / _SAVED
        if saved.is_file():
            pipe.load_mip_adapter(saved)
        return pipe

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        references: Sequence[Reference] | Sequence[Sequence[Reference]] | None = None,
        scale: float = 1.0,
        merge: Merge = "weighted",
        gated: bool | None = None,
        oracle: bool = False,
        framing: Framing = "pad",
        reference_start: float = 0.0,
        reference_end: float = 1.0,
        return_maps: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate images; every other argument, and the result, are those of StableDiffusionXLPipeline.

        Warns about a reference whose name the prompt does not contain.

        Args:
            prompt: one or several.
            *args: as the parent's.
            references: objects for every prompt alike, or one list per prompt (of any lengths, also empty).
            scale: strength of all references; the paper uses 0.75 (sdxl) and 0.65 (sdxl_plus).
            merge: "weighted" (the paper), or "concat" and "mean", the plain IP-Adapter.
            gated: False leaves the learnt gate out (training-free); None uses it if the adapter has one.
            oracle: the references' regions replace the word maps; where all are 0 no reference acts.
            framing: what happens to reference images that are not square: "pad" with white, or "centre_crop".
            reference_start: share of the denoising steps from which on references act.
            reference_end: share of the denoising steps before which they act.
            return_maps: also return where each reference acted, as `maps`, one RelevanceMaps an image.
            **kwargs: as the parent's; `cross_attention_kwargs` may hold LoRA's `scale` and a `reference_maps`.

        Raises:
            ConfigError: no adapter is loaded, `gated=True` and it has no gate, or `return_maps` with
                merge="concat" (which weighs no reference) or with a `reference_maps` of the caller's.
            ReferencesError: references that do not fit the prompts or contradict one another, or no step for them.
        """
        call = _PARENT_CALL.bind(self, prompt, *args, **kwargs)
        call.apply_defaults()
        if unknown := call.arguments["kwargs"].keys() - _PARENT_EXTRAS:
            raise TypeError(
                f"got unknown arguments {', '.join(sorted(unknown))}; see the parent's __call__ for its arguments"
            )
        rows = rows_per_prompt(references, _count_prompts(call.arguments))
        window, given = Window(reference_start, reference_end), call.arguments["cross_attention_kwargs"]
        recorder = None
        if any(rows):
            own = self._references(
                rows, call.arguments, scale=scale, merge=merge, gated=gated, oracle=oracle, framing=framing
            )
            warn_of_absent_names((call.arguments["prompt"], call.arguments["prompt_2"]), rows)
            acting = {**(given or {}), "references": own, "reference_cache": ReferenceCache(own)}
            if return_maps:
                if merge == "concat" or "reference_maps" in acting:
                    raise ConfigError(
                        "got return_maps=True with merge='concat', which weighs no reference, or with another "
                        "reference_maps; leave one out"
                    )
                assert own.latent_size is not None
                acting["reference_maps"] = recorder = MeanRelevance(
                    latent_size=own.latent_size, rows=own.batch - own.negatives
                )
            call.arguments["cross_attention_kwargs"] = acting
            window.apply(call.arguments, resting=given)
        try:
            result = super().__call__(*call.args[1:], **call.kwargs)
        finally:
            # The parent keeps its arguments until the next call; these hold tensors of every layer.
            self._cross_attention_kwargs = given
        if not return_maps:
            return result
        recorder = recorder or MeanRelevance(latent_size=self._latent_size(call.arguments))
        images_per_prompt = call.arguments["num_images_per_prompt"] or 1
        maps = recorder.of_images([[r.name for r in row] for row in rows for _ in range(images_per_prompt)])
        if not call.arguments["return_dict"]:
            return (*result, maps)
        return MIPAdapterXLPipelineOutput(images=result.images, maps=maps)  # pyright: ignore[reportAttributeAccessIssue]

    def _references(
        self,
        rows: list[list[Reference]],
        arguments: dict[str, Any],
        *,
        scale: float,
        merge: Merge,
        gated: bool | None,
        oracle: bool,
        framing: Framing,
    ) -> References:
        """Encode the references of all prompts for one UNet batch, the negative half of guidance first."""
        adapter = self._loaded_adapter()
        if gated and not adapter.has_gate:
            raise ConfigError("got gated=True and a plain IP-Adapter without a gate; leave gated out")
        # The parent decides from this attribute whether to use guidance; it sets it to the same value a moment later.
        self._guidance_scale = arguments["guidance_scale"]
        latent_size = self._latent_size(arguments)
        tokens, absent_RE = self._image_tokens([r for row in rows for r in row], framing)
        phrases, empty_TE = self._phrases([r.name for row in rows for r in row])

        parts = []
        for row in rows:
            part = References(
                image_BNRE=stacked([tokens[id(r)] for r in row], like=absent_RE),
                phrase_BNTE=stacked([phrases[r.name][0] for r in row], like=empty_TE),
                words_BNT=stacked(
                    [phrases[r.name][1] for r in row], like=torch.zeros(empty_TE.shape[0], dtype=torch.bool)
                ),
                present_BN=torch.ones(1, len(row), dtype=torch.bool),
                scale_BN=torch.tensor([[r.scale * scale for r in row]], dtype=torch.float32),
                latent_size=latent_size,
                regions_BNHW=None if oracle else region_masks(row, latent_size),
                oracle_BNHW=oracle_masks(row, latent_size) if oracle else None,
                merge=merge,
                is_gated=gated is not False,
            )
            parts.append(part)
        positive = References.stack(parts).repeat(arguments["num_images_per_prompt"] or 1)
        own = positive
        if self.do_classifier_free_guidance:
            negative = replace(
                positive,
                image_BNRE=absent_RE.expand_as(positive.image_BNRE),
                # The name "" with the token positions of the real names, as the released weights were used.
                phrase_BNTE=empty_TE.expand_as(positive.phrase_BNTE),
            )
            own = positive.with_negative(negative)
        return own.to(device=self._execution_device, dtype=self.unet.dtype)

    def _image_tokens(self, references: Sequence[Reference], framing: Framing) -> tuple[dict[int, Tensor], Tensor]:
        """Tokens (R, E) of each reference by its id, averaged over its images, and those of "no image"; on the CPU."""
        adapter, encoder = self._loaded_adapter(), cast(CLIPVisionModelWithProjection, self.image_encoder)
        unique = {id(reference): reference for reference in references}
        pixels = image_pixels(
            [image for reference in unique.values() for image in reference.images],
            size=cast(int, encoder.config.image_size),
            framing=framing,
        ).to(device=get_module_execution_device(encoder), dtype=encoder.dtype)
        features = adapter.variant.features(encoder, pixels)
        absent_features = adapter.variant.absent_features(encoder, pixels[:1])

        home = next(adapter.projection.parameters()).device
        adapter.projection.to(features.device)
        tokens_XRE = adapter.image_tokens(features).cpu()
        absent_RE = adapter.image_tokens(absent_features)[0].cpu()
        # The projection is no component of the pipeline, so offloading would not send it home.
        adapter.projection.to(home)

        per_reference = tokens_XRE.split([len(reference.images) for reference in unique.values()])
        return {key: t_IRE.mean(dim=0) for key, t_IRE in zip(unique, per_reference, strict=True)}, absent_RE

    def _phrases(self, names: Sequence[str]) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """Embedding (T, E) and word mask (T,) of each name, and the embedding of ""; on the CPU."""
        tokenizers = (self.tokenizer, self.tokenizer_2)
        unique = list(dict.fromkeys(names))
        # Textual inversion spells a learnt token as several.
        spelt = cast(list[str], self.maybe_convert_prompt(unique, self.tokenizer))
        words_XT = name_tokens(spelt, tokenizers)
        *phrases, empty_TE = encode_texts(
            [*spelt, ""], tokenizers=tokenizers, text_encoders=(self.text_encoder, self.text_encoder_2)
        ).cpu()
        return dict(zip(unique, zip(phrases, words_XT, strict=True), strict=True)), empty_TE

    def _latent_size(self, arguments: dict[str, Any]) -> tuple[int, int]:
        if arguments["latents"] is not None:
            height, width = arguments["latents"].shape[-2:]
            return height, width
        pixels = (arguments[side] or self.default_sample_size * self.vae_scale_factor for side in ("height", "width"))
        height, width = (int(side) // self.vae_scale_factor for side in pixels)
        return height, width

    def _loaded_adapter(self) -> MIPAdapter:
        if self.mip_adapter is None:
            raise ConfigError("got references but no adapter; call load_mip_adapter first")
        return self.mip_adapter

    def _found_image_encoder(
        self, encoder: CLIPVisionModelWithProjection | str | Path | None, *, subfolder: str
    ) -> CLIPVisionModelWithProjection:
        if encoder is None:
            if self.image_encoder is None:
                raise ConfigError("got no image_encoder; give the one that the adapter was trained with")
            return self.image_encoder
        if isinstance(encoder, str | Path):
            encoder = CLIPVisionModelWithProjection.from_pretrained(str(encoder), subfolder=subfolder)
        return encoder.to(device=self.device, dtype=self.unet.dtype).eval()  # pyright: ignore


def _count_prompts(arguments: dict[str, Any]) -> int:
    if isinstance(arguments["prompt"], str):
        return 1
    if arguments["prompt"] is not None:
        return len(arguments["prompt"])
    return 1 if arguments["prompt_embeds"] is None else len(arguments["prompt_embeds"])
