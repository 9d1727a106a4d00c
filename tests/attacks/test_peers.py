"""Agreement with foolbox and torchattacks, where the definitions coincide, on a network trained on the digits."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rempart.attacks import attack_batch
from rempart.core.model import Classifier
from rempart.core.threat import Threat
from rempart.data import open_data
from rempart.models import build
from rempart.train import load_recipe, train

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    foolbox = pytest.importorskip("foolbox")
    torchattacks = pytest.importorskip("torchattacks")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
N = 40


@pytest.fixture(scope="module")
def lenet() -> tuple[Classifier, Tensor, Tensor]:
    """A trained LeNet in float64, so that rounding cannot flip a sign, and images it classifies rightly."""
    learn, test = open_data("digits:train"), open_data("digits:test")
    model = build("lenet", shape=(1, 8, 8), num_classes=10, mean=[0.3], std=[0.37])
    train(learn, test, model, load_recipe("plain:digits", {"epochs": "4"}))
    model.double().eval()
    x = test.batch(torch.arange(len(test))).x.double()
    right = (model(x).argmax(1) == test.labels).nonzero()[:N, 0]
    assert len(right) == N
    return model, x[right], test.labels[right]


def ours(model: Classifier, x: Tensor, y: Tensor, threat: Threat, name: str, **options: object) -> Tensor:
    return attack_batch(model, x, y, threat, name, options).x_adv


def foolbox_run(model: nn.Module, attack: Callable[..., object], x: Tensor, y: Tensor, eps: float | None) -> Tensor:
    _, clipped, _ = attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=eps)  # type: ignore
    return clipped


EPS, STEPS = 0.1, 10
LINF = Threat(norm="linf", eps=EPS)


def test_fgsm_is_theirs(lenet: tuple[Classifier, Tensor, Tensor]) -> None:
    model, x, y = lenet
    mine = ours(model, x, y, LINF, "fgsm")
    assert torch.allclose(mine, torchattacks.FGSM(model, eps=EPS)(x, y), atol=1e-5)
    attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    assert torch.allclose(mine, foolbox_run(model, attack, x, y, EPS), atol=1e-5)
    assert float((mine - x).abs().max()) == pytest.approx(EPS)


@pytest.mark.parametrize("step", [0.01, 0.025])
def test_bim_is_theirs(lenet: tuple[Classifier, Tensor, Tensor], step: float) -> None:
    model, x, y = lenet
    mine = ours(model, x, y, LINF, "bim", steps=STEPS, step=step, keep="last")
    assert torch.allclose(mine, torchattacks.BIM(model, eps=EPS, alpha=step, steps=STEPS)(x, y), atol=1e-5)
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=step, steps=STEPS, random_start=False)
    assert torch.allclose(mine, foolbox_run(model, attack, x, y, EPS), atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_mim_is_theirs(lenet: tuple[Classifier, Tensor, Tensor], momentum: float) -> None:
    model, x, y = lenet
    mine = ours(model, x, y, LINF, "mim", steps=STEPS, step=0.02, momentum=momentum, keep="last")
    peer = torchattacks.MIFGSM(model, eps=EPS, alpha=0.02, steps=STEPS, decay=momentum)
    assert torch.allclose(mine, peer(x, y), atol=1e-5)


def test_pgd_is_theirs_from_the_original(lenet: tuple[Classifier, Tensor, Tensor]) -> None:
    model, x, y = lenet
    mine = ours(model, x, y, LINF, "pgd", steps=STEPS, step=0.025, random_start=False, keep="last")
    peer = torchattacks.PGD(model, eps=EPS, alpha=0.025, steps=STEPS, random_start=False)
    assert torch.allclose(mine, peer(x, y), atol=1e-5)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.025, steps=STEPS, random_start=False)
    assert torch.allclose(mine, foolbox_run(model, attack, x, y, EPS), atol=1e-5)


def test_pgd_is_theirs_from_the_same_random_start(
    lenet: tuple[Classifier, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = lenet
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) * 2 * EPS - EPS
    start = (x + noise).clamp(0, 1)
    monkeypatch.setattr(Threat, "start", lambda self, x, rng: start)
    mine = ours(model, x, y, LINF, "pgd", steps=STEPS, step=0.025, keep="last")
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.copy_(noise))
    peer = torchattacks.PGD(model, eps=EPS, alpha=0.025, steps=STEPS, random_start=True)
    assert torch.allclose(mine, peer(x, y), atol=1e-5)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.025, steps=STEPS, random_start=True)
    monkeypatch.setattr(attack, "get_random_start", lambda x0, epsilon: type(x0)(start))
    assert torch.allclose(mine, foolbox_run(model, attack, x, y, EPS), atol=1e-5)


def test_l2_pgd_is_theirs_where_the_box_is_not_touched(lenet: tuple[Classifier, Tensor, Tensor]) -> None:
    model, x, y = lenet
    x = x * 0.5 + 0.25  # away from the bounds, where "project, then clamp" is not the projection
    right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    threat = Threat(norm="l2", eps=0.2)
    mine = ours(model, x, y, threat, "pgd", steps=STEPS, step=0.05, random_start=False, keep="last")
    assert float(mine.min()) > 0 and float(mine.max()) < 1
    peer = torchattacks.PGDL2(model, eps=0.2, alpha=0.05, steps=STEPS, random_start=False)
    assert torch.allclose(mine, peer(x, y), atol=1e-5)
    attack = foolbox.attacks.L2PGD(abs_stepsize=0.05, steps=STEPS, random_start=False)
    assert torch.allclose(mine, foolbox_run(model, attack, x, y, 0.2), atol=1e-5)


def test_float32_is_nearer_to_the_truth_than_theirs(lenet: tuple[Classifier, Tensor, Tensor]) -> None:
    """Against float64, where one wrong sign shows as 2 eps: cross-entropy itself loses digits for confident images."""
    model, x, y = lenet
    truth = ours(model, x, y, LINF, "fgsm")
    try:
        model.float()
        images = x.float()
        mine, theirs = ours(model, images, y, LINF, "fgsm"), torchattacks.FGSM(model, eps=EPS)(images, y)
    finally:
        model.double()
    wrong, peer_wrong = (float(((z - truth).abs() > 1e-5).double().mean()) for z in (mine, theirs))
    assert wrong < 0.001
    assert wrong <= peer_wrong


def sizes(model: nn.Module, x: Tensor, z: Tensor, y: Tensor, norm: str) -> Tensor:
    """Sizes of the perturbations, infinite where the class did not change."""
    distance = Threat(norm=norm).distance(x, z)  # type: ignore
    with torch.no_grad():
        return torch.where(model(z).argmax(1) != y, distance, torch.inf)


def no_larger(mine: Tensor, theirs: Tensor, slack: float = 1.0) -> None:
    assert float(mine.isinf().double().mean()) <= float(theirs.isinf().double().mean())
    assert float(mine.median()) <= float(theirs.median()) * slack
    both = ~mine.isinf() & ~theirs.isinf()
    assert float(mine[both].mean()) <= float(theirs[both].mean()) * slack


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_finds_no_larger_norms(lenet: tuple[Classifier, Tensor, Tensor], norm: str) -> None:
    model, x, y = lenet
    mine = sizes(model, x, ours(model, x, y, Threat(norm=norm), "deepfool", steps=50), y, norm)  # type: ignore
    kind = foolbox.attacks.L2DeepFoolAttack if norm == "l2" else foolbox.attacks.LinfDeepFoolAttack
    no_larger(mine, sizes(model, x, foolbox_run(model, kind(steps=50), x, y, None), y, norm))
    if norm == "l2":
        theirs = torchattacks.DeepFool(model, steps=20, overshoot=0.02)(x[:8], y[:8])
        no_larger(mine[:8], sizes(model, x[:8], theirs, y[:8], norm))


def test_cw_finds_no_larger_norms(lenet: tuple[Classifier, Tensor, Tensor]) -> None:
    model, x, y = lenet
    mine = ours(model, x, y, Threat(norm="l2"), "cw", steps=100, search_steps=6, learning_rate=0.05, initial_const=0.1)
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=6, steps=100, stepsize=0.05, initial_const=0.1, abort_early=True
    )
    found = sizes(model, x, mine, y, "l2")
    no_larger(found, sizes(model, x, foolbox_run(model, attack, x, y, None), y, "l2"))
    theirs = torchattacks.CW(model, c=1, kappa=0, steps=600, lr=0.05)(x, y)
    no_larger(found, sizes(model, x, theirs, y, "l2"))


@pytest.mark.parametrize(("rule", "peer_rule", "norm"), [("l1", "L1", "l1"), ("en", "EN", "l2")])
def test_ead_finds_no_larger_norms(
    lenet: tuple[Classifier, Tensor, Tensor], rule: str, peer_rule: str, norm: str
) -> None:
    model, x, y = lenet
    options = {"steps": 100, "search_steps": 6, "initial_const": 0.1, "beta": 1e-2, "learning_rate": 0.01}
    mine = sizes(model, x, ours(model, x, y, Threat(norm="l1"), "ead", rule=rule, **options), y, norm)
    attack = foolbox.attacks.EADAttack(
        binary_search_steps=6, steps=100, initial_stepsize=0.01, initial_const=0.1, regularization=1e-2,
        decision_rule=peer_rule, abort_early=True,
    )  # fmt: skip
    no_larger(mine, sizes(model, x, foolbox_run(model, attack, x, y, None), y, norm), slack=1.01)
