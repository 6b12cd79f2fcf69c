// SPDX-License-Identifier: Apache-2.0
// The only file that knows Python. Arrays come as addresses, sizes as one list of integers; the
// module links neither torch nor numpy.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "kernels.hpp"

#ifndef RCONV_CUDA_TOOLKIT
#define RCONV_CUDA_TOOLKIT ""
#define RCONV_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace rconv {
namespace {

using Address = std::uintptr_t;

template <class T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

// filters, planes, groups, filter stride, plane stride, then for each of 1 to 3 axes
// size, rows, row step, entries, entry step, padding. See rconv_fast/constraints/layout.py.
Layout unpack(std::vector<int64_t> const& n) {
  constexpr size_t kHead = 5, kPerAxis = 6;
  size_t const n_axes = n.size() < kHead ? 0 : (n.size() - kHead) / kPerAxis;
  if (n_axes < 1 || n_axes > kAxes || n.size() != kHead + n_axes * kPerAxis) {
    throw std::invalid_argument("rconv_fast: layout must have 11, 17 or 23 numbers");
  }
  Layout layout{n[0], n[1], n[2], n[3], n[4], {}};
  for (int a = 0; a < kAxes; ++a) layout.axis[a] = {1, 1, 1, 1, 1, 0};
  for (size_t a = 0; a < n_axes; ++a) {
    int64_t const* m = n.data() + kHead + a * kPerAxis;
    layout.axis[kAxes - n_axes + a] = {m[0], m[1], m[2], m[3], m[4], m[5]};
    if (m[0] < 1 || m[1] < 1 || m[2] < 1 || m[3] < 1 || m[4] < 1 || m[5] < 0) {
      throw std::invalid_argument("rconv_fast: layout must have positive sizes and steps");
    }
  }
  if (n[0] < 1 || n[1] < 0 || n[2] < 1 || n[0] % n[2] != 0) {
    throw std::invalid_argument("rconv_fast: layout must have filters in equal groups");
  }
  return layout;
}

// Calls run with a null Index* (and Real*) of the wanted width.
template <class Run>
void with_index(bool wide_index, Run&& run) {
  wide_index ? run(static_cast<int64_t*>(nullptr)) : run(static_cast<int32_t*>(nullptr));
}
template <class Run>
void with_types(bool double_values, bool wide_index, Run&& run) {
  with_index(wide_index, [&](auto* index) {
    double_values ? run(static_cast<double*>(nullptr), index)
                  : run(static_cast<float*>(nullptr), index);
  });
}

#define RCONV_TYPE(pointer) std::remove_pointer_t<decltype(pointer)>

// The kernels of one lane. `last` is the number of threads, or the stream.
template <class MakeLane>
void bind(py::module_ m, MakeLane lane) {
  using Numbers = std::vector<int64_t>;
  using NoGil = py::call_guard<py::gil_scoped_release>;

  m.def(
      "fill_offsets",
      [lane](Numbers const& n, bool wide, Address crow, Address last) {
        with_index(wide, [&](auto* index) {
          using Index = RCONV_TYPE(index);
          fill_offsets(lane(last), unpack(n), as<Index>(crow));
        });
      },
      NoGil());
  m.def(
      "fill_columns",
      [lane](Numbers const& n, bool wide, Address start, Address col, Address last) {
        with_index(wide, [&](auto* index) {
          using Index = RCONV_TYPE(index);
          fill_columns(lane(last), unpack(n), as<Index const>(start), as<Index>(col));
        });
      },
      NoGil());
  m.def(
      "fill_values",
      [lane](Numbers const& n, bool f64, bool wide, Address start, Address source, Address values,
             Address last) {
        with_types(f64, wide, [&](auto* real, auto* index) {
          using Real = RCONV_TYPE(real);
          using Index = RCONV_TYPE(index);
          fill_values(lane(last), unpack(n), as<Index const>(start), as<Real const>(source),
                      as<Real>(values));
        });
      },
      NoGil());
  m.def(
      "sum_values",
      [lane](Numbers const& n, bool f64, bool wide, Address start, Address values, Address source,
             Address last) {
        with_types(f64, wide, [&](auto* real, auto* index) {
          using Real = RCONV_TYPE(real);
          using Index = RCONV_TYPE(index);
          sum_values(lane(last), unpack(n), as<Index const>(start), as<Real const>(values),
                     as<Real>(source));
        });
      },
      NoGil());
  m.def(
      "count_nonzeros",
      [lane](Numbers const& n, bool f64, bool wide, Address source, Address counts, Address last) {
        with_types(f64, wide, [&](auto* real, auto* index) {
          using Real = RCONV_TYPE(real);
          using Index = RCONV_TYPE(index);
          count_nonzeros(lane(last), unpack(n), as<Real const>(source), as<Index>(counts));
        });
      },
      NoGil());
  m.def(
      "fill_nonzeros",
      [lane](Numbers const& n, bool f64, bool wide, Address start, Address source, Address col,
             Address origin, Address last) {
        with_types(f64, wide, [&](auto* real, auto* index) {
          using Real = RCONV_TYPE(real);
          using Index = RCONV_TYPE(index);
          fill_nonzeros(lane(last), unpack(n), as<Index const>(start), as<Real const>(source),
                        as<Index>(col), as<Index>(origin));
        });
      },
      NoGil());
}

}  // namespace
}  // namespace rconv

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  using rconv::Address;
  m.doc() = "Kernels of rconv_fast. Not public: use rconv_fast.constraints.ops.";
  rconv::bind(m.def_submodule("cpu"),
              [](Address n_threads) { return rconv::Cpu{static_cast<int>(n_threads)}; });
#if RCONV_WITH_CUDA
  rconv::bind(m.def_submodule("cuda"),
              [](Address stream) { return rconv::Cuda{reinterpret_cast<void*>(stream)}; });
#endif
  m.attr("has_cuda") = bool(RCONV_WITH_CUDA);
  m.attr("cuda_toolkit") = RCONV_CUDA_TOOLKIT;
  m.attr("cuda_architectures") = RCONV_CUDA_ARCHITECTURES;
#if defined(_OPENMP)
  m.attr("has_openmp") = true;
#else
  m.attr("has_openmp") = false;
#endif
}
