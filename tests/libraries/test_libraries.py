"""Small models of the libraries that people train, with random weights: no false accusation, and the right gradient.

Against plain torch on the whole batch, with the self-check on, and warnings are errors. The dtype of a loss decides how
close: 1e-12 where it is float64, else 2e-6.
"""

from __future__ import annotations

import copy
import sys
import types
from unittest.mock import MagicMock

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error, total
from torch.nn import functional as F

import gradfold

pytestmark = pytest.mark.slow
INSTALLS = "`make test-all` installs it"


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason=INSTALLS)


@pytest.fixture(scope="module")
def timm():
    """With a stand-in for torchvision, whose transforms and data sets no model needs."""
    names = ["", ".ops.misc", ".transforms", ".transforms.functional", ".datasets"]
    stand_ins = {f"torchvision{name}": MagicMock(spec_set=None) for name in names}
    stand_ins["torchvision.ops.misc"].FrozenBatchNorm2d = types.new_class("FrozenBatchNorm2d", (torch.nn.Module,))
    missing = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(missing)
    try:
        return pytest.importorskip("timm", reason=INSTALLS)
    finally:
        for name in missing:
            del sys.modules[name]


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason=INSTALLS)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason=INSTALLS)


@pytest.fixture(scope="module")
def torchmetrics():
    return pytest.importorskip("torchmetrics", reason=INSTALLS)


def check(model, loss_fn, batch, **options):
    """Two windows, the second of which adds to the first; splits of several sizes."""
    model = model.train()
    expected = full_batch_gradient(model, lambda model: total(loss_fn(model, batch)))
    with torch.no_grad():
        loss = total(loss_fn(copy.deepcopy(model), batch))
    tolerance = 1e-12 if loss.dtype == torch.float64 else 2e-6
    for size in (2, 5):
        trained = copy.deepcopy(model)
        accumulator = gradfold.Accumulator(trained, loss_fn, micro_batch_size=size, **options)
        result = accumulator.backward(batch)
        assert result.num_micro_batches > 1
        assert relative_error(gradients(trained), expected) <= tolerance
        torch.testing.assert_close(result.loss, loss, rtol=10 * tolerance, atol=0)
        if not options.get("batch_norm"):
            accumulator.backward(batch)
            assert relative_error(gradients(trained), {name: 2 * one for name, one in expected.items()}) <= tolerance


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LENGTHS = [9, 3, 12, 5, 12, 1, 7, 4, 10, 6, 2]


def tokens(masked=True):
    """Rows padded on the right, with labels where there are tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def own_loss(model, batch):
    """What the model returns as its loss: a mean over the tokens that have a label."""
    return model(**batch).loss


def llama(transformers):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))


def float64_loss(model, batch):
    """The loss of a causal model in float64; its own is computed in float32, whatever the model's dtype."""
    inputs = {name: leaf for name, leaf in batch.items() if name != "labels"}
    return F.cross_entropy(model(**inputs).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class TestTransformers:
    def test_llama(self, transformers):
        weight = gradfold.token_count("labels", shift=True)
        model = llama(transformers)
        check(model.double(), float64_loss, tokens(), weight=weight)
        check(model.double(), own_loss, tokens(), weight=weight)
        check(model.float(), own_loss, tokens(), weight=weight)

    def test_bert_with_labels_of_rows(self, transformers):
        config = transformers.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        batch = tokens() | {"labels": torch.arange(len(LENGTHS)) % 2}
        check(transformers.BertForSequenceClassification(config).double(), own_loss, batch)

    def test_bert_with_dropout_that_does_not_depend_on_the_split(self, transformers):
        """Its attention keeps layers for their rate only; what the warning says to write is done here."""
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).double().train()
        model = gradfold.convert_dropout(model)
        found = []
        for size in (None, 4):
            trained, options = copy.deepcopy(model), {"weight": gradfold.token_count("labels")}
            accumulator = gradfold.Accumulator(trained, own_loss, micro_batch_size=size, **options)
            with pytest.warns(RuntimeWarning, match=r"not called.*layer\.0\.attention\.self\.dropout"):
                accumulator.backward(tokens())
            for layer in trained.bert.encoder.layer:
                layer.attention.self.dropout.p = 0.0
            trained.zero_grad()
            accumulator.backward(tokens())
            found.append(gradients(trained))
        assert relative_error(*found) <= 1e-12

    def test_t5(self, transformers):
        config = transformers.T5Config(
            **{"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
        model = transformers.T5ForConditionalGeneration(config).double()
        check(model, own_loss, tokens(), weight=gradfold.token_count("labels"))

    def test_mixtral_without_its_auxiliary_loss(self, transformers):
        experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
        config = transformers.MixtralConfig(
            **SMALL,
            **experts,
            num_key_value_heads=2,
            experts_implementation="eager",  # the other one does not take float64
        )
        model = transformers.MixtralForCausalLM(config)
        check(model.double(), float64_loss, tokens(), weight=gradfold.token_count("labels", shift=True))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
class TestPeft:
    @pytest.mark.parametrize("rate", [0.0, 0.2])
    def test_lora_on_llama(self, transformers, peft, rate):
        """With dropout in the adapters the masks are those of the batch, which another window of one update has."""
        config = peft.LoraConfig(r=4, lora_dropout=rate, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(llama(transformers), config).double().train()
        weight = gradfold.token_count("labels", shift=True)
        frozen = [one.clone() for one in model.parameters() if not one.requires_grad]
        if not rate:
            check(model, float64_loss, tokens(), weight=weight)
        else:
            model, found = gradfold.convert_dropout(model), []
            for size in (None, 2, 5):
                trained = copy.deepcopy(model)
                gradfold.Accumulator(trained, float64_loss, micro_batch_size=size, weight=weight).backward(tokens())
                found.append(gradients(trained))
            assert max(relative_error(one, found[0]) for one in found) <= 1e-12
        now = [one for one in model.parameters() if not one.requires_grad]
        assert all(map(torch.equal, frozen, now))


def images(size):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(9, 3, size, size, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(0, 4, (9,), generator=generator)


def classification(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class TestTimm:
    def test_a_resnet_with_exact_batch_norm(self, timm):
        model = timm.create_model("resnet18", num_classes=4).double()
        check(model, classification, images(32), batch_norm="exact")

    def test_a_resnet_is_refused_without(self, timm):
        model = timm.create_model("resnet18", num_classes=4).double()
        with pytest.raises(gradfold.BatchNormError, match="bn1"):
            gradfold.Accumulator(model, classification, micro_batch_size=2).backward(images(32))

    def test_a_vision_transformer(self, timm):
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=4, num_classes=4
        )
        check(model.double(), classification, images(32))


class TestDiffusers:
    def test_a_unet_keeps_its_config(self, diffusers):
        model = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).double()
        config = dict(model.config)
        scheduler = diffusers.DDPMScheduler()
        noisy = images(8)[0]
        batch = {"noisy": noisy, "steps": torch.arange(9) * 100, "noise": noisy.flip(0)}

        def loss_fn(model, batch):
            inputs = scheduler.add_noise(batch["noisy"], batch["noise"], batch["steps"])
            return F.mse_loss(model(inputs, batch["steps"]).sample, batch["noise"])

        check(model, loss_fn, batch)
        gradfold.Accumulator(model, loss_fn, micro_batch_size=4).backward(batch)
        assert dict(model.config) == config and model.config.sample_size == 8


class TestTorchmetrics:
    def test_a_metric_that_loss_fn_updates_counts_every_row_once(self, torchmetrics):
        metric = torchmetrics.MeanMetric(), torchmetrics.classification.MulticlassAccuracy(4, average="micro")
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4)).double()
        batch = images(4)

        def loss_fn(model, batch):
            scores = model(batch[0])
            metric[0].update(scores.detach().sum(1))
            metric[1].update(scores.detach(), batch[1])
            return F.cross_entropy(scores, batch[1])

        check(model, loss_fn, batch)
        for one in metric:
            one.reset()
        gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(batch)
        with torch.no_grad():
            scores = model(batch[0])
        assert float(metric[0].weight) == 9
        assert int(metric[1].tp) == int((scores.argmax(1) == batch[1]).sum())
        assert int(metric[1].tp + metric[1].fn) == 9
