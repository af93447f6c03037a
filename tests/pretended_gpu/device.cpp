// A device that is called "cuda" and computes on the host: its tensors lie in memory of their own, an operation refuses
// tensors of both sides as CUDA does, and every byte is counted. What is measured of it is never time.
//
// Each operation is the host's on views of the device's memory (`host`), by torch's own way for a backend: a fallback
// for all operations, and by hand those that make tensors or views. Fresh memory is NaN, so that what FSDP has given
// back is not read unnoticed.
#include <ATen/ATen.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

namespace {

using at::Tensor;
using c10::Device;
using c10::Stream;
using Tensors = std::vector<Tensor>;

const Device DEVICE(c10::DeviceType::CUDA, 0);

// ---- Memory ---------------------------------------------------------------------------------------------------------
struct Memory {
  std::mutex mutex;
  std::map<const void*, size_t> blocks;
  size_t used = 0, peak = 0;

  void* take(size_t bytes) {
    void* block = nullptr;
    TORCH_CHECK(posix_memalign(&block, 64, bytes) == 0, "no memory for ", bytes, " bytes");
    std::memset(block, 0xFF, bytes);
    std::lock_guard<std::mutex> lock(mutex);
    blocks[block] = bytes;
    used += bytes;
    peak = std::max(peak, used);
    return block;
  }
  void give_back(void* block) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      used -= blocks.at(block);
      blocks.erase(block);
    }
    std::free(block);
  }
  bool holds(const void* place) {
    std::lock_guard<std::mutex> lock(mutex);
    auto after = blocks.upper_bound(place);
    if (after == blocks.begin()) return false;
    auto block = std::prev(after);
    return place < static_cast<const char*>(block->first) + block->second;
  }
};

// Neither is ever destroyed: tensors of Python's outlive this library's own statics
Memory& device_memory() { static auto* memory = new Memory; return *memory; }
Memory& pinned_memory() { static auto* memory = new Memory; return *memory; }

template <Memory& (*memory)()>
struct Allocator final : c10::Allocator {
  Device device;
  explicit Allocator(Device device) : device(device) {}
  static void release(void* block) { if (block) memory().give_back(block); }
  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes ? memory().take(bytes) : nullptr;
    return {block, block, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t bytes) const override { std::memcpy(target, source, bytes); }
};

Allocator<device_memory> device_allocator(DEVICE);
Allocator<pinned_memory> pinned_allocator{Device(c10::DeviceType::CPU)};

void resize_storage(c10::StorageImpl* storage, size_t bytes) {
  auto block = device_allocator.allocate(bytes);
  if (size_t kept = std::min(bytes, storage->nbytes())) std::memcpy(block.get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(block));
  storage->set_nbytes(bytes);
}

// ---- What torch asks of a device ------------------------------------------------------------------------------------
// One device; whatever is asked of its streams has happened already
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return DEVICE.type(); }
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device device) const override { TORCH_CHECK(device.index() <= 0, "no such device: ", device); }
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, DEVICE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* place) const override { return pinned_memory().holds(place); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)

const bool has_allocator = (c10::SetAllocator(DEVICE.type(), &device_allocator, 1), true);

// ---- Operations -----------------------------------------------------------------------------------------------------
// The same memory as a tensor of the host's; what has no elements has no memory to share
Tensor host(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  auto options = tensor.options().device(at::kCPU).requires_grad(false);
  auto view = tensor.numel() == 0
      ? at::empty_strided(tensor.sizes(), tensor.strides(), options)
      : at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {}, options);
  view._set_conj(tensor.is_conj());
  view._set_neg(tensor.is_neg());
  return view;
}

at::ScalarType or_default(std::optional<at::ScalarType> dtype) { return dtype.value_or(at::get_default_dtype_as_scalartype()); }

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA), or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           or_default(dtype));
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()),
                                                       self.key_set(), self.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                    offset ? offset->expect_int() : self.storage_offset());
  return view;
}

const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  size_t bytes = (self.storage_offset() + c10::multiply_integers(sizes)) * self.element_size();
  auto* storage = self.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) resize_storage(storage, bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

Tensor& set_to_place(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                     c10::SymIntArrayRef stride) {
  TORCH_CHECK(source.device_type() == DEVICE.type(), "set_ of a tensor of the device to a storage on ", source.device());
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(source);
  tensor->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  std::vector<int64_t> strides = tensor->strides().vec();
  if (stride.size() == size.size()) strides = C10_AS_INTARRAYREF_SLOW(stride).vec();
  tensor->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), strides, offset.expect_int());
  return self;
}

Tensor& set_to_storage(Tensor& self, at::Storage source) {
  c10::SymInt numbers(source.nbytes() / self.element_size());
  return set_to_place(self, source, 0, c10::SymIntArrayRef{numbers}, {});
}

Tensor& set_to_tensor(Tensor& self, const Tensor& source) {
  return set_to_place(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

Tensor& set_to_nothing(Tensor& self) {
  return set_to_storage(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, &device_allocator, true));
}

Tensor& copy(Tensor& self, const Tensor& source, bool) {  // the one operation with tensors of both sides
  host(self).copy_(host(source));
  return self;
}

void record_stream(Tensor&, Stream) {}

// The host's tensors that stand for the device's within one operation
class Call {
 public:
  explicit Call(const c10::FunctionSchema& schema) : schema_(schema) {}

  c10::IValue to_host(const c10::IValue& value, const c10::Argument& argument) {
    if (value.isTensor()) {  // CUDA reads numbers of the host's, and writes none
      bool written = argument.alias_info() && argument.alias_info()->isWrite();
      return to_host(value.toTensor(), argument, !written && value.toTensor().dim() == 0);
    }
    if (value.isTensorList()) {
      Tensors list;
      for (const Tensor& one : value.toTensorList()) list.push_back(to_host(one, argument, false));
      return list;
    }
    if (value.isOptionalTensorList()) {  // the places of an index, which CUDA fetches
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& one : value.toOptionalTensorList())
        list.push_back(one ? std::optional<Tensor>(to_host(*one, argument, true)) : std::nullopt);
      return list;
    }
    return value.isDevice() ? c10::IValue(Device(at::kCPU)) : value;
  }

  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (!value.isTensorList()) return value;
    Tensors list;
    for (const Tensor& one : value.toTensorList()) list.push_back(to_device(one));
    return list;
  }

  void fill_outputs() {  // that the operation has resized
    for (auto& [ours, hosts] : pairs_)
      if (ours.sizes() != hosts.sizes()) copy(ours.resize_(hosts.sizes()), hosts);
  }

 private:
  static void copy(const Tensor& ours, const Tensor& hosts) { host(ours).copy_(hosts); }

  Tensor to_host(const Tensor& tensor, const c10::Argument& argument, bool may_be_there) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      TORCH_CHECK(may_be_there, "Expected all tensors to be on the same device: ", schema_.name(), " got its ",
                  argument.name(), ", of shape ", tensor.sizes(), ", on the host");
      return tensor;
    }
    for (auto& [ours, hosts] : pairs_)
      if (ours.is_same(tensor)) return hosts;
    pairs_.emplace_back(tensor, host(tensor));
    return pairs_.back().second;
  }

  Tensor to_device(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (auto& [ours, hosts] : pairs_) {
      if (hosts.is_same(tensor)) return ours;
      bool view = tensor.numel() && ours.numel() && hosts.storage().is_alias_of(tensor.storage());
      if (view) return ours.as_strided(tensor.sizes(), tensor.strides(), ours.storage_offset() + tensor.storage_offset());
    }
    auto result = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(DEVICE));
    copy(result, tensor);
    return result;
  }

  const c10::FunctionSchema& schema_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;
};

void on_the_host(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  Call call(schema);
  const size_t first = stack->size() - schema.arguments().size();
  for (size_t i = first; i < stack->size(); ++i)
    (*stack)[i] = call.to_host((*stack)[i], schema.arguments()[i - first]);
  operation.callBoxed(stack);
  call.fill_outputs();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = call.to_device((*stack)[i]);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", [](const Tensor& self, c10::SymIntArrayRef size) {
    return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
  });
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_to_place);
  library.impl("set_.source_Storage", set_to_storage);
  library.impl("set_.source_Tensor", set_to_tensor);
  library.impl("set_", set_to_nothing);
  library.impl("copy_", copy);
  library.impl("record_stream", record_stream);
}

// ---- Collectives ----------------------------------------------------------------------------------------------------
struct Done final : c10d::Work {
  Tensors outputs;
  c10::intrusive_ptr<c10::ivalue::Future> future;

  explicit Done(Tensors tensors) : Work(-1, c10d::OpType::UNKNOWN), outputs(std::move(tensors)) {
    auto type = c10::ListType::create(c10::TensorType::get());
    future = c10::make_intrusive<c10::ivalue::Future>(type, std::vector<Device>{DEVICE});
    future->markCompleted(c10::IValue(outputs));
    finish();
  }
  bool wait(std::chrono::milliseconds) override { return true; }
  void synchronize() override {}
  Tensors result() override { return outputs; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future; }
};

// NCCL's collectives of tensors on the device, by gloo's on the host; it refuses what NCCL refuses
class Collectives final : public c10d::Backend {
  using Pending = c10::intrusive_ptr<c10d::Work>;

 public:
  explicit Collectives(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {
    setGroupUid(gloo_->getGroupUid());
    setGroupDesc(gloo_->getGroupDesc());
  }

  const std::string getBackendName() const override { return "nccl"; }

  Pending broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto views = all_on_host(tensors);
    gloo_->broadcast(views, options)->wait();
    return done(tensors);
  }
  Pending allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    for (Tensor& one : tensors) reduce_among_all(on_host(one), options.reduceOp);
    return done(tensors);
  }
  Pending allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    return allreduce(tensors, options);
  }
  Pending allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    std::vector<Tensors> views{all_on_host(outputs[0])};
    auto sent = all_on_host(inputs);
    gloo_->allgather(views, sent, options)->wait();
    return done(outputs[0]);
  }
  Pending _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions& options) override {
    auto view = on_host(output), sent = on_host(input).clone();  // which may be a part of the output
    gloo_->_allgather_base(view, sent, options)->wait();
    return done({output});
  }
  Pending allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& options) override {
    for (size_t i = 0; i < inputs.size(); ++i) _allgather_base(outputs[i], inputs[i], options);
    return done(outputs);
  }
  Pending reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                         const c10d::ReduceScatterOptions& options) override {
    return scatter_sum(outputs[0], at::cat(all_on_host(inputs[0])), options);
  }
  Pending _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& options) override {
    return scatter_sum(output, on_host(input).clone(), options);
  }
  Pending reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& options) override {
    for (size_t i = 0; i < inputs.size(); ++i) _reduce_scatter_base(outputs[i], inputs[i], options);
    return done(outputs);
  }
  Pending alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions&) override {
    for (int receiver = 0; receiver < getSize(); ++receiver) {  // gloo has no all-to-all of lists
      Tensors sent{on_host(inputs[receiver])}, received;
      for (const Tensor& output : outputs) received.push_back(at::empty_like(on_host(output)));
      std::vector<Tensors> everything{received};
      gloo_->allgather(everything, sent)->wait();
      for (int sender = 0; receiver == getRank() && sender < getSize(); ++sender)
        on_host(outputs[sender]).copy_(everything[0][sender]);
    }
    return done(outputs);
  }
  Pending barrier(const c10d::BarrierOptions&) override {
    gloo_->barrier()->wait();
    return done({});
  }

 private:
  static Tensor on_host(const Tensor& tensor) {
    TORCH_CHECK(tensor.is_cuda(), "NCCL got a tensor of the host");
    TORCH_CHECK(tensor.is_contiguous(), "NCCL got a tensor that is not contiguous");
    return host(tensor);
  }
  static Tensors all_on_host(const Tensors& tensors) {
    Tensors views;
    for (const Tensor& one : tensors) views.push_back(on_host(one));
    return views;
  }
  static Pending done(Tensors outputs) { return c10::make_intrusive<Done>(std::move(outputs)); }

  void reduce_among_all(Tensor tensor, c10d::ReduceOp operation) {
    bool mean = operation == c10d::ReduceOp::AVG;  // which gloo does not have
    c10d::AllreduceOptions options;
    options.reduceOp = mean ? c10d::ReduceOp(c10d::ReduceOp::SUM) : operation;
    Tensors tensors{tensor};
    gloo_->allreduce(tensors, options)->wait();
    if (mean) tensor.div_(getSize());
  }
  Pending scatter_sum(Tensor& output, Tensor whole, const c10d::ReduceScatterOptions& options) {
    reduce_among_all(whole, options.reduceOp);
    on_host(output).copy_(whole.flatten().chunk(getSize())[getRank()].view_as(output));
    return done({output});
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
};

}  // namespace

// ---- For pretend.py -------------------------------------------------------------------------------------------
extern "C" {
size_t pretended_used() { return device_memory().used; }
size_t pretended_peak() { return device_memory().peak; }
void pretended_reset_peak() { device_memory().peak = device_memory().used; }
void pretended_resize(void* storage, size_t bytes) { resize_storage(static_cast<c10::StorageImpl*>(storage), bytes); }
// Gives a group of ranks, which has gloo for the host's tensors, NCCL's collectives for the device's; `alone`: for all,
// of which they refuse the host's
void pretended_collectives(const char* group, bool alone) {
  auto ranks = c10d::resolve_process_group(group);
  auto nccl = c10::make_intrusive<Collectives>(ranks->getBackend(c10::DeviceType::CPU));
  ranks->setBackend(DEVICE.type(), c10d::ProcessGroup::BackendType::NCCL, nccl);
  if (alone) ranks->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::NCCL, nccl);
}
}
