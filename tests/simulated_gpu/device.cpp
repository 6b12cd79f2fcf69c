// SPDX-License-Identifier: Apache-2.0
// Two CUDA devices made of the host's memory, for a torch without CUDA. Each operator of a tensor
// on "cuda" runs torch's own CPU kernel on the same memory. What a GPU refuses is refused: tensors
// of different devices in one operator. What makes the host wait for a GPU is counted, and refused
// under torch.cuda.set_sync_debug_mode("error"). Nothing here says how fast a GPU would be.
//
// To be loaded before torch: it registers the hooks and the guard that torch asks for its devices.
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_nnz_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/col_indices_native.h>
#include <ATen/ops/crow_indices_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/values_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;
using c10::Stream;

constexpr DeviceIndex kDevices = 2;
thread_local DeviceIndex current = 0;

Device gpu(DeviceIndex index) { return {DeviceType::CUDA, index < 0 ? current : index}; }

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Stream stream(Device d) { return Stream(Stream::DEFAULT, gpu(d.index())); }
  Device exchangeDevice(Device d) const override { return gpu(std::exchange(current, d.index())); }
  Device getDevice() const override { return gpu(current); }
  void setDevice(Device d) const override { current = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  Stream getStream(Device d) const noexcept override { return stream(d); }
  Stream getNewStream(Device d, int) const override { return stream(d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  void record(void**, Stream const&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, Stream const&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeDevice(DeviceIndex) const override {}
};

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(n);
    return {data, data, raw_deleter(), gpu(current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, void const* from, size_t n) const override {
    default_copy_data(to, from, n);
  }
};
Allocator allocator;

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex current_device() const override { return current; }
  at::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  int getNumGPUs() const override { return kDevices; }
};

// --- What is counted --------------------------------------------------------------------------

int64_t launches = 0, waits = 0;
bool refuse_waits = false;

void wait(std::string const& why) {
  ++waits;
  TORCH_CHECK(!refuse_waits, "called a synchronizing CUDA operation: ", why);
}

// These read a size, a flag or a value back.
std::unordered_set<std::string> const kWaits = {
    "aten::_local_scalar_dense", "aten::nonzero",       "aten::masked_select", "aten::equal",
    "aten::is_nonzero",          "aten::_unique2",      "aten::unique_dim",    "aten::bincount",
    "aten::unique_consecutive",  "aten::_linalg_eigh",  "aten::_linalg_svd",   "aten::linalg_lstsq",
    "aten::linalg_eig",          "aten::linalg_eigvals"};
// Torch takes their indices from either side; masks become lists of indices first.
std::unordered_set<std::string> const kIndexing = {"aten::index", "aten::index_put_",
                                                   "aten::_index_put_impl_"};
std::unordered_set<std::string> const kCopies = {"aten::copy_", "aten::_to_copy"};

// --- Every operator: torch's own for the CPU, on the same memory ---------------------------------

Tensor same_memory(Tensor const& t, Device device) {
  auto const options = t.options().device(device).requires_grad(false);
  if (t.layout() == at::kSparseCsr) {
    return at::_sparse_csr_tensor_unsafe(same_memory(t.crow_indices(), device),
                                         same_memory(t.col_indices(), device),
                                         same_memory(t.values(), device), t.sizes(), options);
  }
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [t](void*) {}, options, device);
}

struct Call {
  std::string name;
  std::optional<Device> device;                  // of the tensors on a GPU
  bool any_host = false;                         // also tensors, other than numbers, on the host
  std::vector<std::pair<Tensor, Tensor>> twins;  // a tensor on the GPU, the same on the host

  Tensor to_host(Tensor const& t) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      any_host |= t.dim() > 0;
      return t;
    }
    TORCH_CHECK(!device || *device == t.device() || kCopies.count(name),
                "Expected all tensors to be on the same device, but found ", *device, " and ",
                t.device(), " in ", name);
    if (!device) device = t.device();
    for (auto const& [ours, host] : twins) {
      if (ours.is_same(t)) return host;
    }
    bool const to_be_resized = t.layout() == at::kStrided && t.numel() == 0;
    twins.emplace_back(t, to_be_resized ? at::empty(t.sizes(), t.options().device(at::kCPU))
                                        : same_memory(t, DeviceType::CPU));
    return twins.back().second;
  }

  Tensor to_gpu(Tensor const& t, Device where) {
    if (!t.defined() || t.is_cuda()) return t;
    for (auto const& [ours, host] : twins) {
      if (!host.is_same(t)) continue;
      if (host.data_ptr() != ours.data_ptr() || host.sizes() != ours.sizes()) {  // out=, resized
        auto* impl = ours.unsafeGetTensorImpl();
        impl->set_storage_keep_dtype(same_memory(host, ours.device()).storage());
        impl->set_sizes_and_strides(host.sizes(), host.strides());
      }
      return ours;
    }
    return same_memory(t, where);
  }

  void check(std::optional<Device> wanted) const {
    bool const mixed = device && any_host;
    if (kCopies.count(name)) {
      if (mixed || (wanted && device.has_value() != wanted->is_cuda())) wait(name + " across");
    } else {
      TORCH_CHECK(!mixed, "Expected all tensors to be on the same device, but found ", *device,
                  " and cpu in ", name);
    }
    if (kWaits.count(name)) wait(name);
  }
};

template <class Change>
IValue changed(IValue const& value, Change const& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (Tensor const& t : value.toTensorVector()) list.push_back(change(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (auto const& t : value.toOptionalTensorVector()) {
      list.push_back(t ? std::optional(change(*t)) : t);
    }
    return list;
  }
  return value;
}

void run_on_host(c10::OperatorHandle const& op, torch::jit::Stack* stack) {
  Call call{op.schema().name(), {}, false, {}};
  size_t const first = stack->size() - op.schema().arguments().size();
  std::optional<Device> wanted;
  for (size_t i = first; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isDevice()) wanted = std::exchange(value, Device(DeviceType::CPU)).toDevice();
    bool const host_before = call.any_host;
    bool const indices = kIndexing.count(call.name) && value.isOptionalTensorList();
    value = changed(value, [&](Tensor const& t) {
      if (indices && t.defined() && (!t.is_cuda() || t.scalar_type() == at::kBool)) wait(call.name);
      return call.to_host(t);
    });
    if (indices) call.any_host = host_before;
  }
  call.check(wanted);
  ++launches;
  op.callBoxed(stack);
  if (wanted && !wanted->is_cuda()) return;
  Device const where = wanted ? gpu(wanted->index()) : call.device.value_or(gpu(current));
  for (size_t i = first; i < stack->size(); ++i) {
    (*stack)[i] = changed((*stack)[i], [&](Tensor const& t) { return call.to_gpu(t, where); });
  }
}

// --- What only describes memory ---------------------------------------------------------------

using Sizes = c10::SymIntArrayRef;
using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Where = std::optional<Device>;
using Flag = std::optional<bool>;
c10::DispatchKeySet const kCuda(c10::DispatchKey::CUDA);

Tensor empty(Sizes size, Dtype dtype, Layout, Where where, Flag,
             std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard const guard(gpu(where ? where->index() : -1));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, kCuda,
                                   c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(Sizes size, Sizes stride, Dtype dtype, Layout, Where where, Flag) {
  c10::DeviceGuard const guard(gpu(where ? where->index() : -1));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), &allocator, kCuda,
                                           c10::dtype_or_default(dtype));
}
Tensor as_strided(Tensor const& t, Sizes size, Sizes stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional(offset->expect_int()) : std::nullopt);
}
Tensor view(Tensor const& t, Sizes size) {
  return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size));
}
Tensor reshape_alias(Tensor const& t, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size),
                                    C10_AS_INTARRAYREF_SLOW(stride));
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}

#define ON_HOST torch::CppFunction::makeFromBoxedFunction<&run_on_host>()
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(ON_HOST); }
TORCH_LIBRARY_IMPL(_, SparseCsrCUDA, m) { m.fallback(ON_HOST); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
  // Of these torch would run its own device-independent part first, which asks for CUDA's kernels.
  for (char const* name : {"copy_", "_to_copy", "convolution", "convolution_backward"}) {
    m.impl(name, ON_HOST);
  }
}
TORCH_LIBRARY_IMPL(aten, SparseCsrCUDA, m) {
  m.impl("crow_indices", at::native::crow_indices_sparse_csr);
  m.impl("col_indices", at::native::col_indices_sparse_csr);
  m.impl("values", at::native::values_sparse_csr);
  m.impl("_nnz", at::native::_nnz_sparse_csr);
  m.impl("mm", ON_HOST);
}

extern "C" {
int64_t simulated_launches() { return launches; }
int64_t simulated_waits() { return waits; }
void simulated_refuse_waits(bool on) { refuse_waits = on; }
int simulated_device(int index) { return index < 0 ? current : std::exchange(current, index); }
}
