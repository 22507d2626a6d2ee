// Products with weights of 8 bits.
#include "weight_matmul.hpp"

namespace seqmix {

SEQMIX_BINDINGS(module) {
    module.def("weight_matmul_few", [] { return FEW; });
    module.def(
        "weight_matmul_workspace",
        [](int64_t tokens, int64_t inputs, int threads) { return Workspace(tokens, inputs, nullptr).size(threads); },
        "tokens"_a, "inputs"_a, "threads"_a);
    module.def(
        "int8_matmul",
        [](Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor y, Tensor floats, int threads) {
            const int64_t inputs = x.size(2);
            require_shape(weight, "int8_matmul: the weight is [O, I]", {y.size(2), inputs});
            const Factors factors{scale.as<float>(), bias.as<float>()};
            const Workspace workspace(x.size(0) * x.size(1), inputs, floats.as<float>());
            require(floats.size(0) >= workspace.size(threads), "int8_matmul: the workspace is too small");
            auto rows = [&](int64_t first, int64_t, int8_t*) { return weight.as<int8_t>() + first * inputs; };
            if (x.dtype == Dtype::bfloat16) multiply_weight<bfloat16>(x, factors, y, workspace, threads, rows);
            else multiply_weight<float>(x, factors, y, workspace, threads, rows);
        },
        "x"_a, "weight"_a, "scale"_a, "bias"_a.none(), "y"_a, "floats"_a, "threads"_a, WithoutGil());
}

}  // namespace seqmix
