"""What the cost of a matrix is; the update rules themselves, plain and fast, are tested with the optimizer."""

import pytest

from nanochat import rules


def test_a_matrix_costs_what_its_polar_products_cost():
    """Five iterations: a Gram matrix and its square, and a product with the matrix, 2 flops a multiply-add."""
    short, long = 16, 64
    products = 2 * short * short * long + 2 * short**3 + 2 * short * short * long
    assert rules.muon_cost(short, long) == rules.muon_cost(long, short) == 5 * products


def test_tall_matrices_move_further_and_wide_ones_as_they_are():
    assert rules.muon_lr(0.1, 64, 16) == pytest.approx(0.2) and rules.muon_lr(0.1, 16, 64) == 0.1
