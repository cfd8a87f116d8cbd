// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.simd: the row operations of every instruction set, for tests and benchmarks. Addresses
// are integers; the caller keeps the memory alive. `dtype` is a value of deepcomm::DType.
#include "cpu/simd/simd.hpp"

#include <pybind11/stl.h>

#include <vector>

#include "bindings/bind.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

using cpu::Isa;

/// Equally spaced rows.
struct Rows {
    uintptr_t address;
    int64_t stride_bytes;

    char* at(int64_t row) const { return reinterpret_cast<char*>(address) + row * stride_bytes; }
};

/// Reductions that share groups and weights; output i sums `num_rows` addresses of `rows` from
/// i * num_rows on.
struct Reduction {
    Rows dst;
    DType dtype;
    int64_t num_elements;
    std::vector<uintptr_t> rows;
    std::vector<float> weights;
    std::vector<int32_t> group_sizes;
    uintptr_t bias;
    bool stream;
};

std::vector<Isa> supported_isas() {
    std::vector<Isa> isas;
    for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
        if (cpu::isa_supported(isa)) isas.push_back(isa);
    }
    return isas;
}

void copy_rows(Isa isa, Rows dst, Rows src, int64_t num_rows, int64_t num_bytes, bool stream) {
    const auto& ops = cpu::row_ops(isa);
    const auto copy = stream ? ops.copy_stream : ops.copy;
    for (int64_t row = 0; row < num_rows; ++row) copy(dst.at(row), src.at(row), num_bytes);
    if (stream) cpu::stream_fence();
}

void cast_rows(Isa isa, Rows dst, Rows scales, Rows src, int32_t dtype, int64_t num_rows,
               int64_t num_elements, bool ue8m0, const std::vector<Rows>& copies) {
    const auto& ops = cpu::row_ops(isa);
    std::vector<std::byte*> places(copies.size());
    const cpu::CastCopies row_copies{places.data(), static_cast<int32_t>(places.size())};
    for (int64_t row = 0; row < num_rows; ++row) {
        for (size_t copy = 0; copy < copies.size(); ++copy) {
            places[copy] = reinterpret_cast<std::byte*>(copies[copy].at(row));
        }
        auto* out = reinterpret_cast<uint8_t*>(dst.at(row));
        const auto type = static_cast<DType>(dtype);
        if (ue8m0) {
            ops.cast_fp8_ue8m0(out, reinterpret_cast<uint8_t*>(scales.at(row)), src.at(row), type,
                               num_elements, row_copies);
        } else {
            ops.cast_fp8(out, reinterpret_cast<float*>(scales.at(row)), src.at(row), type,
                         num_elements, row_copies);
        }
    }
    cpu::stream_fence();
}

void reduce_rows(Isa isa, const Reduction& job, int64_t num_outputs) {
    const auto& ops = cpu::row_ops(isa);
    const auto num_rows = static_cast<int64_t>(job.rows.size()) / num_outputs;
    for (int64_t output = 0; output < num_outputs; ++output) {
        const auto* rows = reinterpret_cast<const void* const*>(job.rows.data());
        ops.reduce({job.dst.at(output), job.dtype, job.num_elements, rows + output * num_rows,
                    job.weights.empty() ? nullptr : job.weights.data(), job.group_sizes.data(),
                    static_cast<int32_t>(job.group_sizes.size()),
                    reinterpret_cast<const void*>(job.bias), job.stream});
    }
    if (job.stream) cpu::stream_fence();
}

Reduction make_reduction(Rows dst, int32_t dtype, int64_t num_elements, std::vector<uintptr_t> rows,
                         std::vector<float> weights, std::vector<int32_t> group_sizes,
                         uintptr_t bias, bool stream) {
    return {dst,
            static_cast<DType>(dtype),
            num_elements,
            std::move(rows),
            std::move(weights),
            std::move(group_sizes),
            bias,
            stream};
}

}  // namespace

void bind_simd(py::module_& module) {
    auto simd = module.def_submodule("simd", "Row operations of the CPU backend.");
    py::enum_<Isa>(simd, "Isa")
        .value("PORTABLE", Isa::kPortable)
        .value("AVX2", Isa::kAvx2)
        .value("AVX512", Isa::kAvx512);
    py::class_<Rows>(simd, "Rows")
        .def(py::init([](uintptr_t address, int64_t stride_bytes) {
                 return Rows{address, stride_bytes};
             }),
             py::arg("address"), py::arg("stride_bytes") = 0);
    py::class_<Reduction>(simd, "Reduction")
        .def(py::init(&make_reduction), py::kw_only(), py::arg("dst"), py::arg("dtype"),
             py::arg("num_elements"), py::arg("rows"), py::arg("weights"), py::arg("group_sizes"),
             py::arg("bias"), py::arg("stream"));
    simd.def("supported_isas", &supported_isas);
    simd.def("best_isa", &cpu::best_isa);
    simd.def("isa_name", &cpu::isa_name, py::arg("isa"));
    simd.def("copy_rows", &copy_rows, py::arg("isa"), py::arg("dst"), py::arg("src"), py::kw_only(),
             py::arg("num_rows"), py::arg("num_bytes"), py::arg("stream"));
    simd.def("cast_rows", &cast_rows, py::arg("isa"), py::arg("dst"), py::arg("scales"),
             py::arg("src"), py::kw_only(), py::arg("dtype"), py::arg("num_rows"),
             py::arg("num_elements"), py::arg("ue8m0"), py::arg("copies") = std::vector<Rows>());
    simd.def("reduce_rows", &reduce_rows, py::arg("isa"), py::arg("job"), py::kw_only(),
             py::arg("num_outputs"));
}

}  // namespace deepcomm
