// Which of the instruction sets that we build for this processor has. Compiled for the oldest of them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

// Names of modules that can run here, the best first.
static std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
    bool dot = v4 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (dot) found.push_back("v4_dot");
    if (v4) found.push_back("v4");
    if (v3) found.push_back("v3");
    if (v2) found.push_back("v2");
#elif defined(__aarch64__)
    found.push_back("neon");
#endif
    return found;
}

NB_MODULE(_processor, module) { module.def("instruction_sets", &instruction_sets); }
