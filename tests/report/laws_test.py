"""Each law's gradient is exact, and its own surface gives its parameters back."""

import numpy as np
import pytest

from lm.report.laws import LAWS, power, without_excess_parameters
from tests.report.rows import fit, surface

ALL = [*LAWS.values(), without_excess_parameters(), power("N", "loss", True), power("N", "loss", False)]
SURFACES = [
    (1.69, 406.4, 410.7, 0.34, 0.28),
    (1.8172, 482.0, 2085.0, 0.3478, 0.3658),
    (0.5, 20.0, 40.0, 0.465, 0.155),
    (2.5, 1e5, 1e4, 0.7, 0.5),
    (0.05, 5.0, 5.0, 0.1, 0.12),
]


@pytest.mark.parametrize("law", ALL, ids=lambda law: f"{law.name}{law.size}")
def test_the_gradient_is_that_of_differences(law):
    rng = np.random.default_rng(0)
    x = rng.uniform(0.5, 3, (7, len(law.columns)))
    theta = rng.uniform(0.3, 0.9, law.size)
    _, gradient, share = law.predict(theta, x)
    np.testing.assert_allclose(share.sum(axis=1), 1)
    for i in range(law.size):
        step = 1e-6 * np.eye(law.size)[i]
        slope = (law.predict(theta + step, x)[0] - law.predict(theta - step, x)[0]) / 2e-6
        np.testing.assert_allclose(gradient[:, i], slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("truth", SURFACES, ids=str)
def test_a_surface_without_noise_gives_its_parameters_to_1e_9(truth):
    found = fit("chinchilla", **surface(*truth))
    np.testing.assert_allclose(list(found.params.values()), truth, rtol=1e-9)
    assert found.warnings == []


@pytest.mark.parametrize("objective", ["lad", "mse"])
def test_every_objective_finds_a_surface_without_noise(objective):
    from lm.report.minimize import Objective
    from lm.report.result import Settings

    found = fit("chinchilla", Settings(bootstrap=0, objective=Objective(objective)), **surface(*SURFACES[0]))
    np.testing.assert_allclose(list(found.params.values()), SURFACES[0], rtol=1e-9)


def grid(sizes, tokens):
    N, D = np.meshgrid(np.geomspace(*sizes, 6), np.geomspace(*tokens, 6))
    return N.ravel(), D.ravel()


def check(found, **truth):
    assert {name: found.params[name] for name in truth} == pytest.approx(truth, rel=1e-8)
    assert found.warnings == []


def test_kaplan():
    N, D = grid((1e6, 1e9), (1e8, 2e10))
    found = fit("kaplan", N=N, D=D, loss=((6.4e13 / N) ** (0.076 / 0.103) + 1.8e13 / D) ** 0.103)
    check(found, N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103)
    assert found.derived["a"] == pytest.approx(1 / (1 + 0.076 / 0.103))


def test_overtrain_and_its_error():
    N, D = grid((1e6, 1e9), (1e8, 2e10))
    loss = 1.5 + 20 * N**-0.12 + 30 * D**-0.12
    found = fit("overtrain", N=N, D=D, loss=loss, error=0.85 - 2.1 * np.exp(-0.8 * loss))
    check(found, E=1.5, A=20, B=30, eta=0.12, floor=0.15, k=2.1, gamma=0.8)


def test_task_is_two_steps():
    columns = surface(*SURFACES[0])
    found = fit("task", **columns, accuracy=0.25 + 0.6 / (1 + np.exp(-4 * (2.2 - columns["loss"]))))
    check(found, E=1.69, alpha=0.34, floor=0.25, rise=0.6, k=4, L_0=2.2)


def test_critical_batch():
    batch = np.geomspace(8, 4096, 10)
    found = fit("cbs", batch=batch, steps=3000 * (1 + 200 / batch))
    check(found, S_min=3000, E_min=600_000)
    assert found.derived["critical_batch"] == pytest.approx(200)


@pytest.mark.slow
def test_repeat():
    E, A, B, alpha, beta, r_n, r_d = 1.87, 521, 1488, 0.35, 0.35, 5.31, 15.39
    U, repeats, N = (v.ravel() for v in np.meshgrid([1e8, 1e9, 1e10], [1, 4, 10, 40], np.geomspace(1e7, 8e9, 8)))
    unique = np.minimum(N, (alpha * A / (beta * B) * U**beta) ** (1 / alpha))

    def worth(u, size, r):
        return u + u * r * (1 - np.exp(-(size / u - 1) / r))

    loss = E + A * worth(unique, N, r_n) ** -alpha + B * worth(U, U * repeats, r_d) ** -beta
    check(fit("repeat", N=N, D=U * repeats, U=U, loss=loss), R_N=r_n, R_D=r_d, E=E, A=A, B=B, alpha=alpha, beta=beta)
    check(fit("repeat", N=N, D=U * repeats, U=U, U_N=unique, loss=loss), R_N=r_n, R_D=r_d, alpha=alpha)
    few = N < 1.005 * unique
    assert "R_N" not in fit("repeat", N=N[few], D=(U * repeats)[few], U=U[few], loss=loss[few]).params


def test_power_with_and_without_a_floor():
    from lm.report.result import Settings

    N = np.geomspace(1e6, 1e10, 8)
    check(fit("power", N=N, loss=1.7 + 400 * N**-0.34), E=1.7, A=400, alpha=0.34)
    found = fit("power", Settings(bootstrap=0, floor=False), N=N, loss=30 * N**-0.1)
    check(found, A=30, alpha=0.1)
    assert "E" not in found.params


def test_hparams_recover_laws_and_know_their_regret():
    N, D, i, j = (
        v.ravel() for v in np.meshgrid([1e7, 1e8, 1e9], [1e9, 1e10, 1e11], np.arange(-3, 4), np.arange(-3, 4))
    )
    best = np.log2(1.79 * N**-0.713 * D**0.307), np.log2(0.58 * D**0.571)
    u, v = np.round(best[0]) + i - best[0], np.round(best[1]) + j - best[1]
    loss = 2 + 300 * N**-0.33 + 0.01 * u**2 + 0.007 * v**2 - 0.005 * u * v
    columns = {"N": N, "D": D, "lr": 2 ** (u + best[0]), "batch": 2 ** (v + best[1]), "loss": loss}
    found = fit("hparams", **columns)
    assert found.params == pytest.approx(
        {"lr_constant": 1.79, "lr_N": -0.713, "lr_D": 0.307, "batch_constant": 0.58, "batch_N": 0, "batch_D": 0.571},
        rel=1e-8,
        abs=1e-8,
    )
    assert found.derived["largest_regret"] < 1e-12 and found.warnings == []
    cut = (N > 5e7) | (i >= 0)  # The smallest size saw no rate below its best.
    cut = fit("hparams", **{name: values[cut] for name, values in columns.items()})
    assert "edge of the grid: N = 1e+07" in cut.warnings[0] and cut.params["lr_N"] == pytest.approx(-0.713)
