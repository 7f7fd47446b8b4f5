// A Kubernetes device plugin that grants simulated GPUs.
//
// It advertises N devices, and gives a container that is granted some: NVIDIA_VISIBLE_DEVICES, a
// stand-in nvidia-smi that says "simulated", and further host folders, read-only, as NVIDIA's
// toolkit mounts drivers.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const endpoint = "simulated-gpu.sock"

type plugin struct {
	api.UnimplementedDevicePluginServer
	count     int
	unhealthy string // a file listing the ids of unhealthy devices, read again every second
	mounts    []*api.Mount
}

// mountFlags collects -mount host:container.
type mountFlags struct{ mounts *[]*api.Mount }

func (mountFlags) String() string { return "" }

func (f mountFlags) Set(value string) error {
	host, container, found := strings.Cut(value, ":")
	if !found || !filepath.IsAbs(host) || !filepath.IsAbs(container) {
		return fmt.Errorf("want /host/path:/container/path")
	}
	*f.mounts = append(*f.mounts, &api.Mount{HostPath: host, ContainerPath: container, ReadOnly: true})
	return nil
}

func main() {
	log.SetFlags(log.Ltime)
	p := &plugin{}
	folder := flag.String("dir", "/var/lib/kubelet/device-plugins", "the kubelet's folder for device plugins")
	resource := flag.String("resource", "nvidia.com/gpu", "the resource to advertise")
	smi := flag.String("nvidia-smi", "", "the stand-in to mount at /usr/bin/nvidia-smi")
	flag.IntVar(&p.count, "n", 2, "how many devices")
	flag.StringVar(&p.unhealthy, "unhealthy", "", "a file listing ids of unhealthy devices")
	flag.Var(mountFlags{&p.mounts}, "mount", "host:container, mounted read-only; may be repeated")
	flag.Parse()
	if *smi != "" {
		p.mounts = append(p.mounts, &api.Mount{HostPath: *smi, ContainerPath: "/usr/bin/nvidia-smi", ReadOnly: true})
	}
	for { // once more after each restart of the kubelet
		if err := p.serve(*folder, *resource); err != nil {
			log.Print(err)
		}
		time.Sleep(time.Second)
	}
}

// serve registers with the kubelet and answers it until the kubelet removes our socket, which it
// does when it starts.
func (p *plugin) serve(folder, resource string) error {
	socket := filepath.Join(folder, endpoint)
	if err := os.Remove(socket); err != nil && !os.IsNotExist(err) {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	api.RegisterDevicePluginServer(server, p)
	go server.Serve(listener)
	defer server.Stop()
	if err := register(filepath.Join(folder, "kubelet.sock"), resource); err != nil {
		return fmt.Errorf("can't register with the kubelet yet: %w", err)
	}
	log.Printf("registered %d simulated %s", p.count, resource)
	for {
		if _, err := os.Stat(socket); err != nil {
			return fmt.Errorf("the kubelet started anew: registering again")
		}
		time.Sleep(time.Second)
	}
}

func register(kubelet, resource string) error {
	connection, err := grpc.NewClient("unix://"+kubelet, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err = api.NewRegistrationClient(connection).Register(ctx, &api.RegisterRequest{
		Version: api.Version, Endpoint: endpoint, ResourceName: resource, Options: &api.DevicePluginOptions{}})
	return err
}

func (p *plugin) devices() []*api.Device {
	listed, _ := os.ReadFile(p.unhealthy) // no such file: all are healthy
	var devices []*api.Device
	for i := range p.count {
		device := &api.Device{ID: fmt.Sprintf("GPU-51000000-0000-0000-0000-%012d", i), Health: api.Healthy}
		if strings.Contains(string(listed), device.ID) {
			device.Health = api.Unhealthy
		}
		devices = append(devices, device)
	}
	return devices
}

func (p *plugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

func (p *plugin) ListAndWatch(_ *api.Empty, stream api.DevicePlugin_ListAndWatchServer) error {
	var told string
	for {
		devices := p.devices()
		if now := fmt.Sprint(devices); now != told {
			if err := stream.Send(&api.ListAndWatchResponse{Devices: devices}); err != nil {
				return err
			}
			told = now
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

func (p *plugin) Allocate(_ context.Context, request *api.AllocateRequest) (*api.AllocateResponse, error) {
	answer := &api.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		ids := slices.Sorted(slices.Values(container.DevicesIds))
		log.Printf("granting %s", strings.Join(ids, ", "))
		answer.ContainerResponses = append(answer.ContainerResponses, &api.ContainerAllocateResponse{
			Envs:   map[string]string{"NVIDIA_VISIBLE_DEVICES": strings.Join(ids, ",")},
			Mounts: p.mounts,
		})
	}
	return answer, nil
}
