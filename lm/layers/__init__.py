"""Plain functions over arrays, each with the spec of its parameters.

The legend of dimensions, for names (`q_BLHC`) and einsums (`blhc`) in the whole project:
B batch, L query length, S source length, T tokens in a flat list, D model width, H heads, K key/value heads,
G = H/K, C head width, F mlp width, V vocabulary, N layers, E experts, J a token's chosen ones, R rank,
features or rows, W window.
"""
