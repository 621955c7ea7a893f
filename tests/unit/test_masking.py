"""The masked view: golden masks, independence, statistics, edges, every kind, and the patch-aligned short cut."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_papo.config import Config, DataConfig, MaskConfig
from megatron_papo.data import Masks, load_processor, mask_images, masked_raw_images
from megatron_papo.data.images import decode_image
from megatron_papo.data.masking import cell_mask
from megatron_papo.data.random_state import random_state
from megatron_papo.preflight.inputs import faults_of_inputs
from megatron_papo.types import Prompt
from tests.support.tiny import PIXELS, make_tiny_folder

GOLDEN = [[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
DATA = DataConfig(min_pixels=28 * 28, max_pixels=112 * 112, instruction="")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return load_processor(make_tiny_folder(tmp_path_factory.mktemp("model")), DATA)


@pytest.fixture(scope="module", params=PIXELS)
def each_processor(request, tmp_path_factory):
    """One of each family, which cut pictures into patches of different sizes."""
    least, most = PIXELS[request.param]
    folder = make_tiny_folder(tmp_path_factory.mktemp(request.param), family=request.param)
    return load_processor(folder, DataConfig(min_pixels=least, max_pixels=most, instruction=""))


def picture(width, height, value=None, seed=0):
    if value is not None:
        return Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8))
    return Image.fromarray(np.random.RandomState(seed).randint(1, 256, (height, width, 3)).astype(np.uint8))


def as_prompt(processor, *images, row=5):
    compressed = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        compressed.append(buffer.getvalue())
    problem = "<image>" * len(images) + "how many?"
    return Prompt(f"train:{row}", row, problem, "1", tuple(compressed), processor.encode(problem, images))


def black_of(image):
    return (np.array(image) == 0).all(axis=2)


def test_golden_mask(processor):
    prompt = as_prompt(processor, picture(56, 56))
    (masked,) = masked_raw_images(replace(prompt, visit=2), Masks(MaskConfig(cell=14), seed=1))
    cells = black_of(masked)[::14, ::14].astype(int)
    assert cells.tolist() == GOLDEN
    kept = ~black_of(masked)
    assert (np.array(masked)[kept] == np.array(picture(56, 56))[kept]).all()
    assert kept.sum() == 196 * (16 - cells.sum())  # whole cells, all channels


def test_same_after_resume_and_fresh_at_the_next_visit(processor):
    def masked(row=5, seed=1, visit=2):
        prompt = replace(as_prompt(processor, picture(56, 56), row=row), visit=visit)
        return mask_images(prompt, Masks(MaskConfig(), seed), processor).masked_pixel_values_PD

    assert torch.equal(masked(), masked())
    assert not torch.equal(masked(), masked(visit=3))
    assert not torch.equal(masked(), masked(seed=2))
    assert not torch.equal(masked(), masked(row=6))


def test_masked_view_goes_through_the_same_processor(each_processor):
    image, patch = picture(100, 70), each_processor.patch_size
    prompt = mask_images(as_prompt(each_processor, image), Masks(MaskConfig(), seed=0), each_processor)
    pixels = np.array(image)
    pixels[cell_mask(70, 100, patch, 0.6, random_state("mask", 0, 0, "train:5", 0))] = 0
    expected = each_processor.encode("<image>", [Image.fromarray(pixels)]).pixel_values_PD
    assert torch.equal(prompt.masked_pixel_values_PD, expected)
    assert prompt.masked_pixel_values_PD.shape == prompt.inputs.pixel_values_PD.shape
    whole_tokens = {14: [[1, 4, 8]], 16: [[1, 4, 6]]}  # 112 x 56 and 96 x 64 pixels
    assert prompt.inputs.grid_thw_I3.tolist() == whole_tokens[patch]


def test_images_of_a_prompt_are_masked_independently(processor):
    both = as_prompt(processor, picture(56, 56), picture(56, 56))
    first, second = masked_raw_images(both, Masks(MaskConfig(cell=14), seed=0))
    assert (black_of(first) != black_of(second)).any()
    (alone,) = masked_raw_images(as_prompt(processor, picture(56, 56)), Masks(MaskConfig(cell=14), seed=0))
    assert (np.array(alone) == np.array(first)).all()


def test_partial_cells_at_the_edges():
    mask = cell_mask(30, 47, 14, 0.5, np.random.RandomState(0))
    cells = np.random.RandomState(0).random_sample((3, 4)) < 0.5
    assert mask.shape == (30, 47)
    for y in range(30):
        for x in range(47):
            assert mask[y, x] == cells[y // 14, x // 14]
    assert cells[2].any() and not cells[:, 3].any()  # the lower edge is part black, the right one clear


def test_ratio_statistics():
    share = np.mean([cell_mask(224, 224, 14, 0.6, random_state("test", trial)).mean() for trial in range(200)])
    assert abs(share - 0.6) < 0.01  # 51,200 cells: standard error 0.0022
    assert cell_mask(30, 30, 14, 1.0, random_state("test")).all()
    assert not cell_mask(30, 30, 14, 0.0, random_state("test")).any()


def test_text_only_prompt_is_unchanged(processor):
    prompt = Prompt("train:0", 0, "2+2?", "4", (), processor.encode("2+2?", []))
    assert mask_images(prompt, Masks(MaskConfig(), seed=0), processor) is prompt


def test_aligned_to_patches_equals_masking_the_resized_image(each_processor):
    edge = each_processor.patch_size * each_processor.merge_size  # of what one image token covers
    resized, other = picture(4 * edge, 3 * edge), picture(2 * edge, 2 * edge, seed=1)  # left as they are
    mask = MaskConfig(align="patches", ratio=0.5)
    prompt = mask_images(as_prompt(each_processor, resized, other), Masks(mask, seed=0), each_processor)
    masked = []
    for index, image in enumerate((resized, other)):
        rows, columns = image.height // edge, image.width // edge
        cells = random_state("mask", 0, 0, "train:5", index).random_sample(rows * columns).reshape(rows, columns) < 0.5
        assert 0 < cells.sum() < cells.size
        pixels = np.array(image)
        pixels[cells.repeat(edge, axis=0).repeat(edge, axis=1)] = 0
        masked.append(Image.fromarray(pixels))
    expected, _ = each_processor.pixel_values(masked)
    torch.testing.assert_close(prompt.masked_pixel_values_PD, expected, rtol=0, atol=1e-6)
    assert not torch.equal(prompt.inputs.pixel_values_PD, prompt.masked_pixel_values_PD)  # the original stays


def test_swap_takes_another_rows_picture_at_the_same_size(processor):
    class Pool:
        rows = ((), (png(picture(20, 30, value=200)),), (b"broken",), (), (), (png(picture(8, 8, value=7)),))

        def __len__(self):
            return len(self.rows)

        def images(self, row):
            return self.rows[row]

        decoded = staticmethod(decode_image)

    prompt = as_prompt(processor, picture(56, 42))  # row 5 of the pool: never its own picture
    swap = Masks(MaskConfig(kind="swap"), seed=0)
    for visit in range(10):
        (swapped,) = masked_raw_images(replace(prompt, visit=visit), swap, Pool())
        assert swapped.size == (56, 42) and (np.array(swapped) == 200).all()
    with pytest.raises(ValueError, match=r"perception.mask.kind: swap needs the dataset"):
        next(masked_raw_images(prompt, swap))
    Pool.rows = ((), ())
    with pytest.raises(
        ValueError, match=r"perception.mask.kind: swap found no other picture in 100 rows: none of them"
    ):
        next(masked_raw_images(prompt, swap, Pool()))


def test_blur_noise_and_crop(processor):
    halves = np.zeros((60, 60, 3), dtype=np.uint8)
    halves[:, 30:] = 250
    prompt = as_prompt(processor, Image.fromarray(halves))

    def spoil(**mask):
        (image,) = masked_raw_images(prompt, Masks(MaskConfig(**mask), seed=0))
        assert image.size == (60, 60)
        return np.array(image).astype(int)

    blurred = spoil(kind="blur", cell=5)
    assert 100 < blurred[:, 29:31].mean() < 150 and blurred.std() < halves.std()
    noisy = spoil(kind="noise", ratio=0.2)
    assert noisy[:, :30].max() <= 51 and noisy[:, 30:].min() >= 200  # 0.2 x 255 and 0.8 x 250
    assert (spoil(kind="noise", ratio=0.0) == halves).all()
    tall = picture(7, 150)
    (image,) = masked_raw_images(as_prompt(processor, tall), Masks(MaskConfig(kind="noise"), seed=0))
    noise = random_state("mask", 0, 0, "train:5", 0).randint(0, 256, (150, 7, 3))
    assert (np.array(image) == np.rint(0.4 * np.array(tall) + 0.6 * noise)).all(), "one draw, whatever the rows at once"
    assert (spoil(kind="crop", ratio=0.0) == halves).all()


def test_crop_enlarges_a_window_of_the_area_that_is_left(processor):
    slope = np.broadcast_to(4 * np.arange(60, dtype=np.uint8)[None, :, None], (60, 60, 3))
    prompt = as_prompt(processor, Image.fromarray(np.ascontiguousarray(slope)))
    mask = Masks(MaskConfig(kind="crop", ratio=0.75), seed=0)
    crops = [next(masked_raw_images(replace(prompt, visit=visit), mask)) for visit in range(20)]
    lefts = []
    for image in crops:
        columns = np.array(image).astype(int)[:, :, 0]
        assert (columns == columns[:1]).all()  # the slope runs along x only
        assert abs(columns[0, -1] - columns[0, 0] - 4 * 29) <= 8  # a quarter of the area is half of the width
        lefts.append(columns[0, 0])
    assert len(set(lefts)) > 5 and max(lefts) <= 4 * 31  # somewhere else at every visit, within the picture


def test_patches_only_with_cells():
    with pytest.raises(ValueError, match=r"perception.mask.align=patches works with kind=cells, not blur"):
        Config.model_validate({"perception": {"mask": {"align": "patches", "kind": "blur"}}})


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_cell_without_a_size_is_a_patch_of_the_model_folder(each_processor):
    prompt, patch = as_prompt(each_processor, picture(70, 60)), each_processor.patch_size
    masks = [Masks(MaskConfig(cell=cell), seed=3) for cell in (None, patch, 2 * patch)]
    own, same, other = (mask_images(prompt, mask, each_processor).masked_pixel_values_PD for mask in masks)
    assert torch.equal(own, same) and not torch.equal(own, other)


def of_another_size(image, rng):
    return image.resize((image.width + 1, image.height))


def in_grey(image, rng):
    return image.convert("L")


def nothing(image, rng):
    image.putpixel((0, 0), (1, 2, 3))


def failing(image, rng):
    return image[0]


def of_one_argument(image):
    return image


def own(name):
    return Masks(MaskConfig(function=name), seed=0)


def test_a_function_of_ones_own_masks_by_the_numbers_that_it_is_given(processor):
    original = picture(56, 42)
    prompt = as_prompt(processor, original)
    (masked,) = masked_raw_images(prompt, own("examples.own_mask:mosaic"))
    (again,) = masked_raw_images(prompt, own("examples.own_mask:mosaic"))
    (later,) = masked_raw_images(replace(prompt, visit=1), own("examples.own_mask:mosaic"))
    assert masked.size == (56, 42) and len(masked.getcolors()) <= 8 * 6
    assert (np.array(masked) == np.array(again)).all() and (np.array(masked) != np.array(later)).any()
    view = mask_images(prompt, own("examples.own_mask:mosaic"), processor)
    torch.testing.assert_close(view.masked_pixel_values_PD, processor.pixel_values([masked])[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("of_another_size", "gives RGB 57 x 42, not RGB 56 x 42, as the picture is"),
        ("in_grey", "gives L 56 x 42, not RGB 56 x 42, as the picture is"),
        ("nothing", "gives NoneType, not a picture of PIL"),
        ("failing", "TypeError: 'Image' object is not subscriptable"),
    ],
)
def test_what_a_function_of_ones_own_does_wrong_is_named_with_key_and_row(processor, name, told):
    prompt = as_prompt(processor, picture(56, 42))
    with pytest.raises(ValueError) as error:
        mask_images(prompt, own(f"{__name__}:{name}"), processor)
    assert str(error.value) == f"perception.mask.function: {__name__}:{name} for row 5: {told}"


def test_a_mask_that_cannot_be_called_is_refused_before_a_row_is_read():
    with pytest.raises(ValueError, match=r"perception.mask.function: .*:of_one_argument does not take \(image, rng\)"):
        own(f"{__name__}:of_one_argument")
    with pytest.raises(ValueError, match=r"perception.mask.function: cannot import examples.own_mask:absent"):
        own("examples.own_mask:absent")
    with pytest.raises(ValueError, match=r"perception.mask.function takes the place of kind and align"):
        Config.model_validate({"perception": {"mask": {"function": "a:b", "kind": "blur"}}})
    perception = {"mask": {"function": "examples.own_mask:absent"}}
    config = Config.model_validate({"perception": perception, "loss": {"perception_coef": 0.01}})
    said = [fault for fault in faults_of_inputs("train", config) if "mask" in fault]
    assert len(said) == 1 and "perception.mask.function: there is no absent in" in said[0]
