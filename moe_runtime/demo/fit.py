"""Fits the carving of one dense FFN layer: shared neurons, balanced clusters of the others, a linear gate.

Nothing is trained. The fit uses statistics of calibration tokens, spectral clustering and ridge regression, nearly all
in closed form. Only the maintainer's calibration runs it; the artifact holds the results.

Shapes: T tokens, D hidden, N neurons of the dense FFN, E experts, F neurons of one expert, C spectral coordinates.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def neuron_importance(hidden_TN: Tensor, down_DN: Tensor) -> Tensor:
    """How much each neuron adds to each token's output (T, N): |activation| times the norm of its down column."""
    norms_N: Tensor = torch.linalg.vector_norm(down_DN, dim=0)
    return hidden_TN.abs() * norms_N


def select_shared(importance_TN: Tensor, num_shared: int, num_peaks: int = 8) -> Tensor:
    """Sorted indices of the neurons that every token uses (num_shared,).

    The `num_peaks` neurons with the largest single values come first: they carry the massive activations of a few
    positions. In a routed expert, such a neuron would dominate the expert's gate row. The rest are the neurons with the
    largest mean squared importance, clipped at its 99.9th percentile (of every 16th token, which is enough).
    """
    limit = importance_TN[::16].flatten().quantile(0.999)
    energy_N = importance_TN.clamp(max=limit).square().mean(dim=0)
    energy_N[importance_TN.amax(dim=0).topk(num_peaks).indices] = torch.inf
    return energy_N.topk(num_shared).indices.sort().values


def spectral_coordinates(importance_TN: Tensor, num_coordinates: int = 192) -> Tensor:
    """Unit rows (N, C) whose inner products follow the correlation of sqrt(importance) between neurons."""
    root_TN = importance_TN.sqrt()
    root_TN = (root_TN - root_TN.mean(dim=0)) / root_TN.std(dim=0)
    correlation_NN = root_TN.T @ root_TN / root_TN.shape[0]
    values, vectors = torch.linalg.eigh(correlation_NN)
    top_NC = vectors[:, -num_coordinates:] * values[-num_coordinates:].clamp(min=0).sqrt()
    return F.normalize(top_NC, dim=1)


def balanced_clusters(points_NC: Tensor, num_clusters: int, generator: torch.Generator, rounds: int = 40) -> Tensor:
    """Spherical k-means with clusters of N / num_clusters points each. Returns the cluster of each point (N,).

    Every round assigns the points to the centres under the size limit, then moves the centres. It stops early if
    nothing changes.
    """
    num_points = points_NC.shape[0]
    assert num_points % num_clusters == 0
    centres = points_NC[torch.randperm(num_points, generator=generator)[:num_clusters]]
    clusters_N = torch.full((num_points,), -1)
    for _ in range(rounds):
        previous_N, clusters_N = clusters_N, _assign_balanced(points_NC @ centres.T)
        if torch.equal(previous_N, clusters_N):
            break
        sums = torch.zeros_like(centres).index_add_(0, clusters_N, points_NC)
        centres = F.normalize(sums, dim=1)
    return clusters_N


def _assign_balanced(similarity_NE: Tensor) -> Tensor:
    """Assign points to clusters of equal size, with a high total similarity: greedy, then swaps that improve it."""
    num_points, num_clusters = similarity_NE.shape
    room = [num_points // num_clusters] * num_clusters
    clusters = [-1] * num_points
    for pair in similarity_NE.flatten().argsort(descending=True).tolist():
        point, cluster = divmod(pair, num_clusters)
        if clusters[point] < 0 and room[cluster] > 0:
            clusters[point] = cluster
            room[cluster] -= 1
    clusters_N = torch.tensor(clusters)
    while True:
        # gain if i and j swap clusters
        moved_NN = similarity_NE[:, clusters_N]
        own_N = moved_NN.diagonal()
        gain_NN = moved_NN + moved_NN.T - own_N[:, None] - own_N[None, :]
        gain_N, partner_N = gain_NN.max(dim=1)
        swapped: set[int] = set()
        for i in gain_N.argsort(descending=True).tolist():
            j = int(partner_N[i])
            if gain_N[i] < 1e-4:
                break
            if not swapped & {i, j}:
                clusters_N[i], clusters_N[j] = clusters_N[j].clone(), clusters_N[i].clone()
                swapped |= {i, j}
        if not swapped:
            return clusters_N


def expert_output_norms(hidden_TN: Tensor, down_DN: Tensor, experts_EF: Tensor) -> Tensor:
    """Norm of each expert's output per token (T, E)."""
    columns = []
    for neurons_F in experts_EF:
        part_DF = down_DN[:, neurons_F]
        hidden_TF = hidden_TN[:, neurons_F]
        columns.append(((hidden_TF @ (part_DF.T @ part_DF)) * hidden_TF).sum(dim=1))
    return torch.stack(columns, dim=1).clamp(min=0).sqrt()


def fit_gate(x_TD: Tensor, norms_TE: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Gate rows (E, D) and intercepts (E,) that predict which experts matter for a token, float64.

    Ridge regression from the standardised inputs to the output norms, each clipped at its 99th percentile. The
    standardisation is folded into the rows. The mean over experts is subtracted, as it does not affect the choice. The
    scores are divided by their mean spread over the experts.
    """
    x_TD, norms_TE = x_TD.double(), norms_TE.double()
    limit_E = norms_TE.kthvalue(int(0.99 * norms_TE.shape[0]), dim=0).values
    target_TE = norms_TE.minimum(limit_E)
    mean_D, std_D, mean_E = x_TD.mean(dim=0), x_TD.std(dim=0), target_TE.mean(dim=0)
    z_TD = (x_TD - mean_D) / std_D
    gram_DD = z_TD.T @ z_TD
    gram_DD.diagonal().add_(ridge * x_TD.shape[0])
    weight_DE = torch.linalg.solve(gram_DD, z_TD.T @ (target_TE - mean_E)) / std_D[:, None]
    bias_E = mean_E - mean_D @ weight_DE
    weight_DE = weight_DE - weight_DE.mean(dim=1, keepdim=True)
    bias_E = bias_E - bias_E.mean()
    spread = (x_TD @ weight_DE + bias_E).std(dim=1).mean()
    return (weight_DE / spread).T, bias_E / spread
