// Products with weights of 8 bits.
#include "weight_matmul.hpp"

namespace seqmix {

SEQMIX_BINDINGS(module) {
    module.def("weight_matmul_few", [] { return FEW_TOKENS; });
    module.def("weight_matmul_workspace", &workspace_floats, "tokens"_a, "inputs"_a, "threads"_a);
    module.def(
        "int8_matmul",
        [](Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor y, Tensor room, int threads) {
            multiply_weight(x, {weight, scale, bias, {}}, y, room, threads);
        },
        "x"_a, "weight"_a, "scale"_a, "bias"_a.none(), "y"_a, "room"_a, "threads"_a, WithoutGil());
}

}  // namespace seqmix
