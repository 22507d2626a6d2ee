// Products with weights of 4 bits.
#include "weight_matmul.hpp"

namespace seqmix {

SEQMIX_BINDINGS(module) {
    module.def(
        "int4_matmul",
        [](Tensor x, Tensor codes, Tensor factors, Tensor scale, Tensor bias, Tensor y, int64_t group, Tensor room,
           int threads) {
            require_codes({codes, factors, x.size(2), group});
            multiply_weight(x, {{}, scale, bias, {codes, factors, x.size(2), group}}, y, room, threads);
        },
        "x"_a, "codes"_a, "factors"_a, "scale"_a, "bias"_a.none(), "y"_a, "group"_a, "room"_a, "threads"_a,
        WithoutGil());
}

}  // namespace seqmix
