// Which of the instruction sets that we build for this processor has. Compiled for the oldest of them.
#include <cstdint>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)

struct Registers {
    uint32_t a = 0, b = 0, c = 0, d = 0;  // zero where the processor does not know the leaf
};

Registers leaf(uint32_t number, uint32_t part = 0) {
    Registers r;
    __get_cpuid_count(number, part, &r.a, &r.b, &r.c, &r.d);
    return r;
}

bool has(uint32_t word, std::initializer_list<int> bits) {
    for (int bit : bits)
        if (!(word >> bit & 1)) return false;
    return true;
}

// The registers that the operating system saves when it switches threads: what it does not save must not be used.
uint32_t saved_registers() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

#endif

// Names of modules that can run here, the best first. The levels are those of the x86-64 psABI, in full: a virtual
// machine may hide a single feature.
std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
#if defined(__x86_64__)
    Registers basic = leaf(1), wide = leaf(7), wider = leaf(7, 1), extended = leaf(0x80000001u);
    uint32_t saved = has(basic.c, {27}) ? saved_registers() : 0;  // OSXSAVE
    // SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT; LAHF
    bool v2 = has(basic.c, {0, 9, 13, 19, 20, 23}) && has(extended.c, {0});
    // FMA, MOVBE, AVX, F16C; BMI1, AVX2, BMI2; LZCNT; the halves of 32-byte registers
    bool v3 = v2 && has(basic.c, {12, 22, 28, 29}) && has(wide.b, {3, 5, 8}) && has(extended.c, {5}) &&
              has(saved, {1, 2});
    // AVX-512 F, DQ, CD, BW, VL; masks and 64-byte registers
    bool v4 = v3 && has(wide.b, {16, 17, 28, 30, 31}) && has(saved, {5, 6, 7});
    bool dot = v4 && has(wide.c, {11}) && has(wider.a, {5});  // AVX-512 VNNI, BF16
    if (dot) found.push_back("v4_dot");
    if (v4) found.push_back("v4");
    if (v3) found.push_back("v3");
    if (v2) found.push_back("v2");
#elif defined(__aarch64__)
    found.push_back("neon");
#endif
    return found;
}

}  // namespace

NB_MODULE(_processor, module) {
    module.def("instruction_sets", &instruction_sets);
    module.attr("compiler") = SEQMIX_COMPILER;
    module.attr("sanitizers") = SEQMIX_SANITIZE;
}
